# Ravine as an image: not root, on a read-only file system, with a health check.
#
#   docker build -t ravine .
#   docker run --rm -v ravine:/data ravine ravine keys create --tenant me --scope admin
#   docker run --read-only --cap-drop all -v ravine:/data -p 8000:8000 ravine
#
# Without RAVINE_REDIS_URL the sessions lie in the volume /data, kept by a private Valkey. Without a key, and without
# RAVINE_INSECURE=true, it does not start: whoever reaches the port would have every session. docs/containers.md has the
# rest.

ARG PYTHON_IMAGE=docker.io/library/python:3.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# pip stays outside of what is copied into the image. Wheels alone: nothing is compiled here, and there is no compiler.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/ravine \
 && python -m pip --python /opt/ravine/bin/python install --only-binary :all: --require-hashes -r requirements.lock

# The build backend in an environment of its own, by the same lock as in the tests. If it comes to need one package
# more, pip refuses here for want of a hash, and the name joins this list.
COPY requirements-test.lock ./
RUN awk '/^[a-z]/ { keep = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } keep' requirements-test.lock \
      > requirements-build.lock \
 && python -m venv /opt/build \
 && /opt/build/bin/pip install --only-binary :all: --require-hashes -r requirements-build.lock

COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY service service
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist . \
 && python -m pip --python /opt/ravine/bin/python install --no-deps --no-index dist/*.whl

# The health check: no shell and no curl, and no proxy, which urllib would take from the environment.
RUN printf '%s\n' '#!/opt/ravine/bin/python -I' \
      'import os, ssl, sys, http.client' \
      'port = int(os.environ.get("RAVINE_PORT", "8000"))' \
      'if os.environ.get("RAVINE_TLS_CERT"):  # not for 127.0.0.1: whether it answers is asked, not who' \
      '    unchecked = ssl._create_unverified_context()' \
      '    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=4, context=unchecked)' \
      'else:' \
      '    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)' \
      'connection.request("GET", "/readyz")' \
      'sys.exit(connection.getresponse().status != 200)' \
      > /opt/ravine/bin/ravine-ready \
 && chmod 755 /opt/ravine/bin/ravine-ready

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="Ravine" \
      org.opencontainers.image.description="Optimization as a service: durable optimizer sessions over HTTP." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/ravine /opt/ravine
RUN install -d -o 10001 -g 10001 /data

# The data lie in a directory inside the volume: the volume itself may belong to root (Kubernetes with fsGroup) or
# hold a lost+found, and the embedded store insists on a directory that is its own.
ENV PATH=/opt/ravine/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAVINE_HOST=0.0.0.0 \
    RAVINE_DATA=/data/ravine

# By number, so that `runAsNonRoot` can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["ravine-ready"]
ENTRYPOINT ["ravine"]
CMD ["serve"]
