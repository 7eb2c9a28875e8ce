# syntax=docker/dockerfile:1
# Two images out of one file: `api` (no torch) and `worker`.
#   docker build --target api -t tersor-api .
#   docker build --target worker -t tersor-worker .

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    PATH=/opt/tersor/bin:$PATH
RUN python -m venv /opt/tersor \
    && groupadd --gid 10001 tersor \
    && useradd --uid 10001 --gid tersor --home-dir /var/lib/tersor --create-home --shell /usr/sbin/nologin tersor
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./

# The dependencies come before the code, so that a change of code does not install them again.
FROM base AS api-dependencies
RUN mkdir app worker && touch app/__init__.py worker/__init__.py \
    && pip install --constraint constraints.txt '.[postgres]' && pip uninstall --yes tersor

FROM api-dependencies AS api-build
COPY app app
# The contract is all of it: the API image holds no worker code.
RUN mkdir -p worker && touch worker/__init__.py && pip install --no-deps . \
    && rm -rf /opt/tersor/lib/python3.11/site-packages/worker

FROM api-dependencies AS worker-dependencies
ARG TORCH=torch==2.13.0
# For GPU hosts: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url ${TORCH_INDEX} ${TORCH} \
    && pip install --constraint constraints.txt '.[worker,postgres]' && pip uninstall --yes tersor

FROM worker-dependencies AS worker-build
COPY app app
COPY worker worker
RUN pip install --no-deps .

FROM base AS api
COPY --from=api-build /opt/tersor /opt/tersor
WORKDIR /var/lib/tersor
RUN install -d -o tersor -g tersor /data
USER tersor
ENV TERSOR_DATA_DIR=/data TERSOR_HOST=0.0.0.0 TERSOR_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/healthz').raise_for_status()"]
CMD ["tersor", "api"]

FROM base AS worker
# The report says how fast a program is that torch compiles, and torch's compiler calls one of C++.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=worker-build /opt/tersor /opt/tersor
WORKDIR /var/lib/tersor
RUN install -d -o tersor -g tersor /data /scratch
USER tersor
ENV TERSOR_DATA_DIR=/scratch
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["tersor", "doctor", "--worker"]
CMD ["tersor", "worker"]
