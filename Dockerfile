# docker build -t ft .                                        CPU
# docker build -t ft-cuda --build-arg TORCH_INDEX= .          CUDA: the package index's own build of torch, libraries included
# docker run --rm -it ft                                      make quickstart
# docker run --rm ft make test
# docker run --rm --gpus all -v "$PWD:/work" -v ft-cache:/cache -w /work ft-cuda ft sft mine.yaml
FROM python:3.12-slim

# make: the two commands of the README; g++: kernels that torch and triton compile when they are first used.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends make g++ git && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=$TORCH_INDEX PIP_NO_CACHE_DIR=1 HF_HOME=/cache PATH=/ft/.venv/bin:$PATH

# The dependencies first, so that a change of the code does not install them again.
WORKDIR /ft
COPY pyproject.toml README.md LICENSE Makefile ./
COPY finetune/__init__.py finetune/__init__.py
COPY recipes recipes
COPY data_templates data_templates
RUN make .venv/installed
COPY . .
RUN touch .venv/installed && ft --version && mkdir -p /cache

CMD ["make", "quickstart"]
