#!/bin/sh
# audit.sh audit: ask for known vulnerabilities of every version in constraints.txt that this Python would install.
# audit.sh sbom: write down what is installed in .venv, as CycloneDX JSON. Both tools have an environment of their own.
# Exit code of audit: 0 all were asked about and none is known, 1 some are, 2 it could not be found out.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-audit
ours=.venv/bin/python
packages="pip-audit==2.10.1 cyclonedx-bom==7.5.0"

[ -x "$ours" ] || {
    echo "error: expected our environment at $ours: run 'make setup' first" >&2
    exit 2
}
if [ "$(cat "$venv/.packages" 2>/dev/null)" != "$packages" ]; then
    echo "installing $packages into $venv"
    rm -rf "$venv"
    "$ours" -m venv "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $packages
    echo "$packages" >"$venv/.packages"
fi
mkdir -p runs

if [ "${1:-audit}" = sbom ]; then
    "$venv/bin/cyclonedx-py" environment "$ours" --output-reproducible --of JSON -o runs/sbom.cdx.json
    echo "runs/sbom.cdx.json: $(grep -c '"purl"' runs/sbom.cdx.json) packages"
    exit 0
fi

# pip-audit passes over what its service does not know and still reports no vulnerabilities, so what it asked is counted.
for service in pypi osv; do
    rm -f runs/audit.json
    "$venv/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off --timeout 15 \
        --vulnerability-service "$service" --format json --output runs/audit.json >runs/audit.log 2>&1 || true
    [ -s runs/audit.json ] || continue
    code=0
    "$venv/bin/python" - "$service" <<'PY' || code=$?
import json, sys

packages = json.load(open("runs/audit.json", encoding="utf-8"))["dependencies"]
unknown = [package["name"] for package in packages if "skip_reason" in package]
known = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
if packages and len(unknown) < len(packages):
    for package, vulnerability in known:
        mended = ", ".join(vulnerability["fix_versions"]) or "none yet"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
    print(f"{sys.argv[1]}: {len(packages) - len(unknown)} of {len(packages)} versions asked about, {len(known)} known faults")
    if unknown:
        print("not known there:", ", ".join(unknown))
    sys.exit(1 if known else 2 if unknown else 0)
sys.exit(3)
PY
    [ "$code" = 3 ] || exit "$code"
done
echo "error: neither PyPI nor OSV answered about any version (runs/audit.log): nothing was audited" >&2
exit 2
