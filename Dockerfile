# docker build -t sd-perf .                          the newest torch with CUDA; run with --gpus all
# docker build -t sd-perf --build-arg DEVICE=cpu .   a tenth of the size, without CUDA
# docker run --rm sd-perf                            measures the default set of the machine
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# cuda: the wheels of torch contain CUDA; the host has only the driver. cpu: the wheels without it.
ARG DEVICE=cuda
# A file of constraints/; torch112 needs --build-arg PYTHON=3.10, and EXTRAS=test,report: it has no xFormers.
ARG TORCH=torch215
# By default test,report, with CUDA also gpu, the extra of the published five.
ARG EXTRAS=

# torch.compile calls a compiler, and --perf-against calls git in a mounted clone; saved runs of the image itself name no
# commit, since it has no .git. The image is named by its digest, not by these versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.9 \
    && useradd --create-home --uid 1000 perf

WORKDIR /sd-perf
COPY --chown=perf:perf . .
RUN case "$DEVICE" in \
        cuda) backend= extras=test,report,gpu ;; \
        cpu) backend=--torch-backend=cpu extras=test,report ;; \
        *) echo "DEVICE is cuda or cpu" >&2; exit 4 ;; esac \
    && uv pip install --system --no-cache $backend -c "constraints/$TORCH.txt" -e ".[${EXTRAS:-$extras}]" \
    && chown perf:perf .

# The user of docs/fleet/kubernetes.yaml
USER 1000
ENV PYTHONUNBUFFERED=1
CMD ["pytest", "perf", "--benchmark-autosave"]
