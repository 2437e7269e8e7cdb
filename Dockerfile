# The Deshift server. Without a model it builds and serves the demonstration; what it needs:
#
#     docker build -t deshift:0.1.0 .
#     docker run --init -e DESHIFT_API_KEY=... -v deshift-models:/var/lib/deshift -p 8000:8000 deshift:0.1.0
#     docker run ... -e DESHIFT_MODEL=llava-hf/llava-1.5-7b-hf -e DESHIFT_STEERING_MODE=sample ...
#
# The root file system may be read only: everything is written to /var/lib/deshift (models, store)
# and /tmp. The image holds no secret and takes none while it is built.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS build

# Which build of torch. For an NVIDIA GPU, by the CUDA version that its driver knows:
#     docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 ...
# The libraries of CUDA come with it; the host needs its driver and the NVIDIA Container Toolkit.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/deshift/bin:$PATH
WORKDIR /src

RUN python -m venv /opt/deshift
COPY deploy/constraints.txt deploy/constraints.txt
# Torch alone from its index, which has other versions of everything else.
RUN pip install --constraint deploy/constraints.txt --index-url "$TORCH_INDEX" --no-deps torch
COPY pyproject.toml README.md LICENSE ./
# Dependencies before the sources, so that a change of those costs no download.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
 && pip install --constraint deploy/constraints.txt --requirement requirements.txt setuptools
COPY steering steering
COPY server server
RUN pip install --no-deps --no-build-isolation . \
 && pip check

FROM ${PYTHON_IMAGE}

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Deshift" \
      org.opencontainers.image.description="OpenAI-compatible server for vision-language models that keeps their language model's safety" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# With it the server builds the kernels of its decoder at start, for the processor that it runs on
# (DESHIFT_DECODER); without, it serves more slowly.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 deshift \
 && useradd --uid 10001 --gid deshift --no-create-home --home-dir /var/lib/deshift --shell /usr/sbin/nologin deshift \
 && install --directory --owner deshift --group deshift --mode 0750 /var/lib/deshift
COPY --from=build /opt/deshift /opt/deshift

# Every interface of the container; without DESHIFT_API_KEY the server then refuses to start. The
# operators' listener stays on the container's loopback until DESHIFT_ADMIN_HOST says otherwise.
# Progress bars (TQDM) would stand between the log's lines of JSON.
ENV PATH=/opt/deshift/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DESHIFT_HOST=0.0.0.0 \
    DESHIFT_PORT=8000 \
    DESHIFT_CACHE=/var/lib/deshift \
    DESHIFT_LOG_FORMAT=json \
    TQDM_DISABLE=1 \
    HF_HOME=/var/lib/deshift/huggingface \
    XDG_CACHE_HOME=/var/lib/deshift/cache
USER 10001:10001
WORKDIR /var/lib/deshift
VOLUME /var/lib/deshift
EXPOSE 8000 8001

# /health, not /ready: what is unhealthy is restarted by some, which cures a dead engine; it cures
# neither missing vectors nor a drain. The server listens when its model is loaded; the first start
# may download that for long.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['DESHIFT_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["deshift"]
CMD ["serve", "--or-demo"]
