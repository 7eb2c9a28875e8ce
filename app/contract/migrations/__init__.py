"""Alembic's environment and the migrations, inside the package so that an installed service can migrate itself."""
