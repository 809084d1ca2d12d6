# Two images on one base. `server` has no torch; `trainer` has all of it. compose.yaml runs both on one volume.
#
#   docker build --target server  -t luthier-server  .
#   docker build --target trainer -t luthier-trainer .

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
# tini hands signals on and reaps what workers and trainers leave behind.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# One user with one number in both images: they share the files and UNIX sockets of /data.
RUN groupadd --gid 10001 luthier \
    && useradd --uid 10001 --gid luthier --create-home luthier \
    && install -d -o luthier -g luthier -m 0700 /data
WORKDIR /src
COPY constraints.txt ./
COPY proto ./proto

FROM base AS server
COPY server ./server
COPY trainer ./trainer
RUN pip install -c constraints.txt ./proto ./server
# The server executes the trainer's torch-free workers (luthier_trainer.data.check, luthier_trainer.inspect), which need
# orjson alone. The package lies at the same path in both images, because the server tells trainers where
# builtin models are.
RUN pip install -c constraints.txt --no-deps ./trainer orjson
USER luthier
WORKDIR /data
ENV LUTHIER_DATA_DIR=/data
VOLUME /data
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["luthierd", "health"]
ENTRYPOINT ["tini", "--"]
CMD ["luthierd"]

FROM base AS trainer
# Without NVIDIA GPUs a smaller torch will do: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt torch==2.13.0
COPY trainer ./trainer
RUN pip install -c constraints.txt ./proto './trainer[gguf]'
USER luthier
WORKDIR /data
# What is fetched from the hub outlives the container.
ENV HF_HOME=/data/cache/huggingface
VOLUME /data
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import socket; socket.socket(socket.AF_UNIX).connect('/data/host.sock')"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "luthier_trainer.host", "--data-dir", "/data", "--warm", "--idle-exit", "inf"]
