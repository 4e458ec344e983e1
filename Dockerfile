# syntax=docker/dockerfile:1
# The driftlock binary with the filter beside it, where `gateway` and `replay` look for it. The image of the filter alone, for
# Istio, is made by `cargo xtask package`.
#
#   docker build -t driftlock .
#   docker run --rm -p 8470:8470 -v "$PWD/snapshots:/snapshots" driftlock serve --snapshots /snapshots \
#     --observations /tmp/observations.jsonl --listen 0.0.0.0:8470
FROM rust:1.95.0-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends clang \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /driftlock
COPY . .
RUN cargo xtask build

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /driftlock/dist/ /usr/local/bin/
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/driftlock"]
