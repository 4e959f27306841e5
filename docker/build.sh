#!/bin/sh
# build.sh VARIANT NAME [BUILD OPTIONS ...]: build the image with docker, buildah or podman, whichever works here, and
# print its size. VARIANT: cuda or cpu. Options go to the builder as they are: --build-arg TORCH_INDEX=…, --secret …
set -eu
variant=$1
name=$2
shift 2
cd "$(dirname "$0")/.."

case "$variant" in
    cuda) ;;
    # A base without CUDA; one named by IMAGE_BASE comes later on the line, and wins.
    cpu) set -- --build-arg BASE=debian:bookworm-slim "$@" ;;
    *)
        echo "error: VARIANT: expected cuda or cpu, got '$variant'" >&2
        exit 2
        ;;
esac
set -- --file docker/Dockerfile --build-arg "VARIANT=$variant" --tag "$name" "$@"

# HEALTHCHECK is known to Docker's format only, which docker itself writes anyway.
if docker info >/dev/null 2>&1; then
    builder=docker
    DOCKER_BUILDKIT=1 docker build "$@" .
elif command -v buildah >/dev/null 2>&1; then
    builder=buildah
    buildah build --layers --format docker "$@" .
elif command -v podman >/dev/null 2>&1; then
    builder=podman
    podman build --layers --format docker "$@" .
else
    echo "error: expected docker (with its daemon running), buildah or podman, found none: install one of them" >&2
    exit 2
fi
echo "$name: $("$builder" images --format '{{.Size}}' "$name" | head -n 1), built by $builder"
