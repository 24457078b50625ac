# A server of one model (docs/guides/serving.md).
#
#   docker build -t minigpt4 .
#   docker build -t minigpt4:cuda --build-arg EXTRAS=serve,cuda .   # needs the NVIDIA container runtime
#   docker run -p 127.0.0.1:8000:8000 -v $PWD/model:/model:ro -v minigpt4-cache:/cache minigpt4
FROM python:3.12-slim-bookworm

ARG EXTRAS=serve

WORKDIR /opt/minigpt4
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY minigpt4_jax minigpt4_jax
COPY convert convert
COPY configs configs
# The versions are those of setup.cfg.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ".[${EXTRAS}]"

RUN useradd --create-home --uid 1000 minigpt4 && install --directory --owner=minigpt4 /cache
USER 1000

# Compiled programs: the second start takes seconds.
ENV MINIGPT4_JAX_CACHE=/cache
VOLUME ["/cache"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]

ENTRYPOINT ["minigpt4", "serve", "--host=0.0.0.0", "--port=8000"]
CMD ["--model=/model"]
