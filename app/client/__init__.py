"""A typed client of the HTTP API, for programs and for the command line."""

from app.client.client import Client
from app.client.transport import ClientError, Document

__all__ = ["Client", "ClientError", "Document"]
