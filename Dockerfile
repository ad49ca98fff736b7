# CPU:   docker build -t flatbit .
# CUDA:  docker build -t flatbit:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#                     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:   docker run --rm -v "$PWD/runs:/app/runs" flatbit model=resnet8 data=embedded
ARG BASE=python:3.11-slim

FROM ${BASE} AS base
RUN command -v python3 >/dev/null || { \
        apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
WORKDIR /app

FROM base AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --index-url "${TORCH_INDEX}" torch==2.13.0
# Dependencies before sources: an edit of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN /opt/venv/bin/pip install -c constraints.txt .
COPY . .
RUN /opt/venv/bin/pip install --no-deps -e .

FROM base AS final
RUN useradd --create-home --uid 10001 flatbit && install -d -o flatbit -g flatbit /app/runs
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 WANDB_MODE=offline
USER flatbit
VOLUME /app/runs
ENTRYPOINT ["python", "-m", "research.train"]
