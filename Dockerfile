# The first stage installs the dependencies and our package; the second contains only the result.
# Pin the base image by its digest before you rely on it (docs/operations.md, "Pin the images").
ARG PYTHON=python:3.11-slim-bookworm
FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/imagepipeline
COPY requirements.txt ./
RUN /opt/imagepipeline/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE NOTICE dagster.yaml workspace.yaml ./
COPY imagepipeline ./imagepipeline
RUN /opt/imagepipeline/bin/pip install --no-cache-dir --no-deps .

FROM ${PYTHON}
RUN useradd --uid 10001 --create-home imagepipeline \
    && install --directory --owner=10001 --group=10001 --mode=0700 \
        /var/lib/imagepipeline /run/imagepipeline /run/imagepipeline/sockets
COPY --from=build /opt/imagepipeline /opt/imagepipeline
ENV PATH=/opt/imagepipeline/bin:$PATH PYTHONUNBUFFERED=1 IMAGEPIPELINE_HOME=/var/lib/imagepipeline
USER 10001:10001
CMD ["imagepipeline", "--help"]
