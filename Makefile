# make train: install everything into .venv, then run the main job.  make help: the other targets.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help train test lint results figures records docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## */make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

train: .venv/.installed  ## float baseline, LSQ at 4 and 2 bits, deployment, table and figure
	$(BIN)/python -m analysis.main_job

# One thread a worker: two pytest workers fill two cores, and results do not depend on the thread count.
test: .venv/.installed  ## every test, on two workers
	OMP_NUM_THREADS=1 WANDB_MODE=offline $(BIN)/python -m pytest tests -n 2

lint: .venv/.installed  ## ruff (rules and format), mypy strict on research and callbacks
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

RECORDS := docs/results/records
TABLES := $(BIN)/python -m analysis.tables

results: .venv/.installed  ## generated pages: results from the kept run records, the tables of mechanics, figures
	$(BIN)/python -m analysis.mechanics output=docs/mechanics.md
	$(BIN)/python -m analysis.cost_lines
	$(BIN)/python -m analysis.figures.catalogue output=docs/figures.md
	$(TABLES) 'runs=$(RECORDS)/lsq_resnet20_cifar10_*/*' output=docs/results/cifar10.md title=CIFAR-10 preface=analysis/prefaces/cifar10.md
	$(TABLES) 'runs=$(RECORDS)/*_resnet20_cifar10_w[124]a[234]*/*' output=docs/results/mechanics.md \
		'title=Mechanics on CIFAR-10' preface=analysis/prefaces/mechanics_cifar10.md columns=changes \
		baseline=method=lsq difference=accuracy
	$(TABLES) 'runs=$(RECORDS)/oscillation_*_resnet20_cifar10_w2a2/*,$(RECORDS)/*_mobilenet_v2_cifar10_w3a3/*' output=docs/results/oscillation.md \
		'title=Oscillations on CIFAR-10' preface=analysis/prefaces/oscillation.md \
		standard=experiment,method,bits,seeds,epochs,val_accuracy,float_accuracy,accuracy,deployed_accuracy,hardware,minutes \
		columns=gain,accuracy_before_batchnorm,oscillation_tracker/oscillating,oscillation_tracker/ever_oscillated
	$(TABLES) 'runs=$(RECORDS)/float_resnet20_cifar10/*,$(RECORDS)/*_resnet20_cifar10_float/*' output=docs/results/post_training.md \
		'title=Quantization after training on CIFAR-10' preface=analysis/prefaces/post_training.md \
		standard=experiment,method,seeds,epochs,accuracy,hardware,minutes columns=ptq_8,ptq_7,ptq_6,ptq_5,ptq_4,ptq_3 \
		within=model,data,epochs baseline=method=float difference=accuracy,ptq_5,ptq_4
	$(TABLES) 'runs=$(RECORDS)/three_epochs/*' output=docs/results/three_epochs.md 'title=Three epochs of everything' \
		preface=analysis/prefaces/three_epochs.md
	$(TABLES) 'runs=$(RECORDS)/*_resnet20_cifar10_w3/*,$(RECORDS)/lsq_resnet20_cifar10_w[2345]a[2345]/*,$(RECORDS)/allocation_retrained/*,$(RECORDS)/allocation_four_bits/*,$(RECORDS)/allocation_two_bits/*' \
		output=docs/results/bits_per_layer.md 'title=Bits per layer on CIFAR-10' preface=analysis/prefaces/bits_per_layer.md \
		standard=experiment,widths_from,method,seeds,epochs,weight_bits,accuracy,size_kib,gbops,hardware,minutes \
		where=epochs=10 within=model,data baseline=method=lsq,widths_from=recipe difference=accuracy at_equal=size_kib,gbops
	$(TABLES) 'runs=$(RECORDS)/allocation_three_epochs/*' output=docs/results/bits_three_epochs.md \
		'title=Bits per layer, three epochs' preface=analysis/prefaces/bits_three_epochs.md columns=weight_bits,changes
	$(TABLES) 'runs=$(RECORDS)/sweep_lsq_recipe/*' output=docs/results/lsq_recipe.md 'title=LSQ recipe at two bits' \
		preface=analysis/prefaces/lsq_recipe.md columns=optimizer.lr,quantizer.weight.init,quantizer.input.init
	$(TABLES) 'runs=$(RECORDS)/*/*' measured=curvature output=docs/results/curvature.md \
		'title=Curvature on CIFAR-10' preface=analysis/prefaces/curvature.md

RUNS ?= tests/records

figures: .venv/.installed  ## every figure, from the bundled records or from RUNS=DIR, into figures/
	$(BIN)/python -m analysis.figures runs=$(RUNS) output=figures

SHORT := lsq float ewgs noise_tempering saq oscillation freezing n2uq widths bin_regularization binary search ssps csq \
	constrained
LOOKED_AT := lsq float n2uq widths bin_regularization binary oscillation freezing

CURVATURE := $(BIN)/python -m analysis.curvature k=1 max_iterations=40 probes=12 seeds=0 wandb=disabled

records: export FLATBIT_RUNS := runs/records
records: .venv/.installed  ## train the short runs behind the bundled records anew; about an hour
	$(BIN)/python -m research.train experiment=float_resnet8_embedded name=records_start model.width=8 \
		trainer.max_epochs=6 data.validation=500 deploy.onnx=false logger.wandb.mode=disabled
	for name in $(SHORT); do $(BIN)/python -m research.train -cd sweeps -cn records_$$name -m || exit; done
	for run in runs/records/records_float/*/; do $(BIN)/python -m research.evaluate run=$$run 'ptq=[8,6,5,4,3,2]' || exit; done
	for name in $(LOOKED_AT); do $(BIN)/python -m analysis.distributions "runs=runs/records/records_$$name/*" || exit; done
	for name in lsq oscillation freezing; do $(BIN)/python -m analysis.oscillation "runs=runs/records/records_$$name/*" && \
		$(BIN)/python -m analysis.batchnorm "runs=runs/records/records_$$name/*" || exit; done
	for run in runs/records/records_saq/* runs/records/records_lsq/*; do \
		$(BIN)/python -m analysis.sharpness runs=$$run 'rho=[0.02,0.05,0.1]' images=256 || exit; done
	for run in runs/records/records_lsq/* runs/records/records_ewgs/* runs/records/records_noise_tempering/*; do \
		$(BIN)/python -m analysis.sharpness runs=$$run norm=filter 'rho=[0.005,0.01,0.02]' images=256 && \
		$(BIN)/python -m analysis.landscape runs=$$run images=256 && $(CURVATURE) runs=$$run images=256 || exit; done
	for run in runs/records/records_saq/*; do $(BIN)/python -m analysis.landscape runs=$$run images=256 || exit; done
	for run in runs/records/records_float/*; do $(CURVATURE) runs=$$run images=128 || exit; done
	$(BIN)/python -m analysis.keep 'runs=runs/records/records_[!s]*/*,runs/records/records_s[!t]*/*' output=tests/records

docs: .venv/.docs  ## build the site into site/
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove caches and built files; keeps .venv and runs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone: its exact version decides which wheel is taken, whatever else is being resolved.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python %d.%d is too old: use make PYTHON=python3.11 or newer" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@
