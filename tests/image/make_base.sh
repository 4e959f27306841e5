#!/bin/sh
# make_base.sh NAME: a Debian root file system as a local image, to build on where no registry can be reached. Installs
# what that, the build and the tests need, as root on Debian. Does nothing when the image is there.
set -eu
name=$1

missing=""
for tool in buildah debootstrap runc; do
    command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        echo "error: expected buildah, debootstrap and runc, found no$missing: install them" >&2
        exit 2
    fi
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
fi
if buildah inspect --type image "$name" >/dev/null 2>&1; then
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debootstrap --variant=minbase bookworm "$work/root"
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/var/lib/apt/lists/*
tar -C "$work/root" -cf "$work/root.tar" .
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/root.tar" /
buildah commit --quiet --rm "$container" "$name"
