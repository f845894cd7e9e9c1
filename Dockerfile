# docker build -t megatron-bert-tp .
# docker run --rm megatron-bert-tp
# PIP_FLAGS picks another build of torch, for example a CPU-only one; see README.md.
FROM python:3.11-slim

ARG PIP_FLAGS=""

WORKDIR /opt/megatron_bert_tp

# The dependencies first, on an empty package: a change of the code does not install torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir megatron_bert_tp \
    && touch megatron_bert_tp/__init__.py \
    && pip install --no-cache-dir ${PIP_FLAGS} -c constraints.txt ".[plots]"

COPY megatron_bert_tp ./megatron_bert_tp
RUN pip install --no-cache-dir ${PIP_FLAGS} --no-deps --force-reinstall .

COPY configs ./configs
COPY launch ./launch

# Runs write to ./runs, and no run needs to be root.
RUN useradd --create-home trainer && mkdir runs && chown trainer runs
USER trainer

CMD ["python", "-m", "megatron_bert_tp.pretrain", "--help"]
