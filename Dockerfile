# One image for every role. By itself it is a whole engine, with its own Postgres and Ray; KubeRay starts the nodes of a
# cluster from it, by a command of its own (deploy/raycluster.yaml).
#
#   docker build --tag gavel .
#   docker run --publish 8700:8700 --volume gavel:/var/lib/gavel --shm-size 256m --ulimit nofile=51024 gavel
#
# Ray's object store lies in the shared memory, and each socket is an open file.

# A version, not a digest: which one is yours depends on the registry that you trust.
FROM python:3.12.12-slim-bookworm AS build

RUN python -m venv /opt/gavel
ENV PATH=/opt/gavel/bin:$PATH
WORKDIR /source
# Before the code, so that a change of it does not install everything again.
COPY requirements.lock .
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.12.12-slim-bookworm

# tini is process 1: it passes signals on, and clears away the dead children of Postgres and Ray.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.0-* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /var/lib/gavel gavel \
    && install --directory --owner gavel --group gavel /var/lib/gavel /var/lib/gavel/logs
COPY --from=build /opt/gavel /opt/gavel

ENV PATH=/opt/gavel/bin:$PATH \
    GAVEL_HOST=0.0.0.0 \
    GAVEL_DATA_DIR=/var/lib/gavel

# By number: Kubernetes can then see that it is not root.
USER 10001
WORKDIR /var/lib/gavel
VOLUME /var/lib/gavel
EXPOSE 8700

# A start takes seconds, and longer where much of the log of Postgres must be played back. With GAVEL_TLS_CERTIFICATE
# this needs another command (--health-cmd): the gateway then speaks TLS only.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8700/health', timeout=4)"]

# No shell in between: SIGTERM reaches `gavel up`, which stops everything in good order.
ENTRYPOINT ["tini", "--", "gavel", "up"]
