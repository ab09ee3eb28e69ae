# Needs python3 >= 3.11 with venv. The heads of cmres.py and cmres_test.py name what is installed.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PYTEST  = $(BIN)/python -m pytest -q -o markers='openstack: needs a cloud, named by OS_CLOUD'

help:            ## show this
	@sed -n 's/^\([a-z-]*\): *.*## /make \1\t/p' Makefile | expand -t 22

serve: $(VENV)/cmres $(BIN)/cmres   ## serve the page and REST, and run the life cycle, on 127.0.0.1:8080
	$(BIN)/python cmres.py serve

test: $(VENV)/cmres_test   ## run all tests that need no cloud
	$(PYTEST) -n 4 --dist worksteal -m 'not openstack' cmres_test.py  # more than cores: many wait

test-openstack: $(VENV)/cmres_test   ## run the tests for a real OpenStack, on the cloud OS_CLOUD
	$(PYTEST) -m openstack cmres_test.py

CALDAV = caldav==3.6.0  # its own test-suite is run against `serve`

test-clients: $(VENV)/cmres_test   ## run the tests with calendar programs, which are installed beside
	@test -x $(VENV)/clients/bin/python || $(PYTHON) -m venv $(VENV)/clients
	@$(VENV)/clients/bin/python -m pip install -q --disable-pip-version-check '$(CALDAV)' \
	  'pytest>=8,<10' pytest-asyncio proxy.py pyfakefs tzlocal vobject radicale
	@test -d $(VENV)/clients/suite || { $(VENV)/clients/bin/python -m pip download -q --no-deps \
	  --no-binary caldav --disable-pip-version-check -d $(VENV)/clients/source '$(CALDAV)' && \
	  mkdir $(VENV)/clients/suite && tar xzf $(VENV)/clients/source/*.tar.gz -C $(VENV)/clients/suite --strip-components 1; }
	CALDAV_CLIENTS='$(abspath $(VENV))/clients' $(PYTEST) -k calendar_clients cmres_test.py

bench: $(VENV)/cmres_test   ## print how fast it is, as ratios measured side by side
	$(BIN)/python cmres_test.py

clean:           ## remove the environment and what tests left
	rm -rf $(VENV) .pytest_cache .hypothesis __pycache__

# A stamp holds the dependencies of a script's head: pip runs when they change, not at every edit.
$(VENV)/%: %.py FORCE | $(BIN)/python
	@sed -n '/^# \/\/\/$$/q; s/^#   "\([^"]*\)",.*/\1/p' $< > $@.new
	@cmp -s $@.new $@ && rm $@.new || { $(BIN)/python -m pip install -q --disable-pip-version-check -r $@.new && mv $@.new $@; }

$(VENV)/cmres_test: $(VENV)/cmres

$(BIN)/cmres: | $(BIN)/python   # the same program under a short name, compiled once
	@printf '#!%s\nimport sys\nsys.path.insert(0, "%s")\nfrom cmres import main\nsys.exit(main())\n' \
	  '$(abspath $(BIN))/python' '$(CURDIR)' > $@ && chmod +x $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: help serve test test-clients test-openstack bench clean FORCE
