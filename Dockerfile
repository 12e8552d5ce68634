FROM python:3.13-slim AS base

FROM base AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# What the image runs: a venv without pip, filled by the pip beside it.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/gateway
RUN pip --python /opt/gateway/bin/python install --require-hashes -r requirements.lock
# The project as a wheel. Its build backend is pinned in the embedded lock, and stays behind in this stage.
COPY requirements-embedded.lock ./
RUN pip install --require-hashes -r requirements-embedded.lock
COPY pyproject.toml README.md ./
COPY gateway gateway
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist .
RUN pip --python /opt/gateway/bin/python install --no-index --no-deps dist/*.whl

FROM base
RUN groupadd --gid 10001 gateway && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin gateway
COPY --from=builder /opt/gateway /opt/gateway
WORKDIR /app
COPY gateway.yaml ./
COPY policies policies
ENV PATH=/opt/gateway/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 GATEWAY_HOST=0.0.0.0 GATEWAY_PORT=8080
# By number, so that Kubernetes' runAsNonRoot can tell.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# A proxy in the container's environment is for the way out, never for this question.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 CMD ["python", "-c", "import os; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:' + os.environ['GATEWAY_PORT'] + '/-/health', timeout=4)"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
