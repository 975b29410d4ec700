# The committed files of this checkout and all that `make test` needs, on a CPU: docker build -t latentrefine . && docker run --rm latentrefine
# PyTorch's CPU build comes from its own index; every other version is that of constraints.txt.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
COPY .git /source/.git
RUN git clone -q /source /latentrefine
WORKDIR /latentrefine
RUN make .venv/.installed
CMD ["make", "test"]
