# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-docs docs wheel lint format bench bench-gpu interop audit sbom image test-image clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(STAMP)  ## create .venv with the exact versions of constraints.txt

$(STAMP): setup.py constraints.txt scripts/make_venv.sh
	@sh scripts/make_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

demo: $(STAMP)  ## pack records, train on 2 ranks with clusters, print a table (10 minutes at most on 2 cores)
	@$(BIN)/python -m training.demo

# Files of tests at a time: one more than the cores of a small machine, as some of them wait. Each takes 3 GB at the most.
WORKERS ?= 3

test: lint  ## lint, types and all tests (WORKERS=8 for a larger machine, 3 GB each)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-docs: $(STAMP)  ## README's commands too, the site in a browser, the wheel in a clean environment
	@OMP_NUM_THREADS=1 CLUSTERFACE_TEST_DOCS=1 $(BIN)/pytest --durations=10 tests/docs

docs: $(STAMP)  ## the documentation as a site in runs/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "runs/site: $(BIN)/python -m http.server --bind 127.0.0.1 --directory runs/site 8000 shows it"

wheel: $(STAMP)  ## sdist and wheel in runs/dist, looked at in a clean environment
	@sh scripts/release.sh runs/dist

lint: $(STAMP)  ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff write the format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## benchmarks that run on this machine, some ten minutes on 2 cores; a plot in runs/bench
	@$(BIN)/python -m benchmarks.head --rates 1 0.1 0.01 --plot runs/bench/head.png
	@$(BIN)/python -m benchmarks.optim
	@$(BIN)/python -m benchmarks.collectives
	@$(BIN)/python -m benchmarks.data --images 5000

# Results are named by theme, GPU and date.
GPUS = $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)
ON_GPU = $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-')_$(shell date -u +%F)
RESULTS := benchmarks/results

bench-gpu: $(STAMP)  ## the same on GPUs, up to 29 million identities, with results to commit
	@[ $(GPUS) -gt 0 ] || { echo "error: nvidia-smi names no GPU here: use 'make bench'" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.head --device cuda --batch 1024 --classes 93431 360232 2059906 --rates 1 0.1 0.01 \
		--repeats 10 --warmup 3 --out $(RESULTS)/head_$(ON_GPU).md --plot $(RESULTS)/head_$(ON_GPU).png
	@$(BIN)/python -m benchmarks.head --device cuda --batch 1024 --classes 29000000 --rates 1 --centre-dtype bf16 \
		--out $(RESULTS)/head-29m_$(ON_GPU).md
	@$(BIN)/python -m benchmarks.kmeans --device cuda --points 1000000 --clusters 360232 --main-only --repeats 3 \
		--out $(RESULTS)/kmeans_$(ON_GPU).md
	@$(BIN)/python -m benchmarks.service_step --device cuda --out $(RESULTS)/service-step_$(ON_GPU).md
	@$(BIN)/python -m benchmarks.optim --device cuda --batch 128 --classes 360232 2059906 --repeats 10 --warmup 3 \
		--out $(RESULTS)/optim_$(ON_GPU).md
	@$(BIN)/python -m benchmarks.backbones --device cuda --compile --out $(RESULTS)/backbones_$(ON_GPU).md
	@[ $(GPUS) -lt 2 ] || $(BIN)/python -m benchmarks.collectives --device cuda --ranks $(GPUS) \
		--out $(RESULTS)/collectives_$(ON_GPU).md

interop: $(STAMP)  ## genuine mxnet reads what we write, and we read what it writes (own environment, Python <= 3.11)
	@sh tests/interop/run.sh

audit: $(STAMP)  ## known vulnerabilities of the versions of constraints.txt (own environment, needs PyPI or OSV)
	@sh scripts/audit.sh audit

sbom: $(STAMP)  ## what is installed in .venv, as CycloneDX JSON in runs/sbom.cdx.json
	@sh scripts/audit.sh sbom

# IMAGE_BASE: another base image. IMAGE_OPTIONS: more options of the builder (docs/cluster.md).
VARIANT ?= cuda
IMAGE ?= clusterface:$(VARIANT)

image:  ## the container image, by docker, buildah or podman (VARIANT=cpu for CPUs)
	@sh docker/build.sh "$(VARIANT)" "$(IMAGE)" $(if $(IMAGE_BASE),--build-arg "BASE=$(IMAGE_BASE)") $(IMAGE_OPTIONS)

test-image: $(STAMP)  ## build the CPU image and train in it (needs root on Debian, some ten minutes on 2 cores)
	@$(BIN)/pytest --timeout=3600 -v tests/image/check_image.py

clean:  ## remove the environments and the demo's run
	rm -rf $(VENV) .venv-interop .venv-audit runs/demo
