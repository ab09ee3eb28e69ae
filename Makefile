# Needs python3 >= 3.11 with venv. The heads of cmres.py and cmres_test.py name what is installed.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
MARKERS = "markers=openstack: needs a cloud, named by OS_CLOUD$$(printf '\n%s' 'clients: needs programs of others' 'browser: drives a browser' 'sqlite: asks for what only a file has')"
# compiled once, also where Python is told to keep nothing, and not by each program that is tested
PYTEST  = $(BIN)/python -X no_debug_ranges -m py_compile cmres.py cmres_test.py && $(BIN)/python -m pytest -q -o $(MARKERS)

help:            ## show this
	@sed -n 's/^\([a-z-]*\): *.*## /make \1\t/p' Makefile | expand -t 22

serve: $(VENV)/cmres $(BIN)/cmres $(if $(findstring postgres,$(DATABASE)),$(VENV)/psycopg)   ## serve the page and REST, and run the scheduler, on 127.0.0.1:8080
	$(if $(DATABASE),CMRES_DATABASE='$(DATABASE)') $(BIN)/python cmres.py serve

test: $(VENV)/cmres_test   ## run all tests that need no cloud, no browser and no programs of others
	$(PYTEST) --assert=plain -n 6 --dist worksteal -m 'not openstack and not clients and not browser' cmres_test.py  # more than cores: many wait

test-postgres: $(VENV)/cmres_test $(VENV)/psycopg   ## run the same tests on PostgreSQL, which they start themselves
	export STORE_ENGINE=postgresql; $(PYTEST) --assert=plain -n $(or $(WORKERS),4) --dist worksteal -m 'not openstack and not clients and not sqlite' $(if $(ONLY),-k '$(ONLY)') cmres_test.py

test-openstack: $(VENV)/cmres_test $(VENV)-clients/done $(VENV)-clients/horizon/done $(VENV)-clients/tempest/done   ## run the tests for a real OpenStack, on the cloud OS_CLOUD
	export CLIENTS=$(abspath $(VENV)-clients)/bin; $(PYTEST) -p no:warnings --tb short --maxfail 8 -m openstack cmres_test.py  # one host that is dead fails them all

test-clients: $(VENV)/cmres_test $(VENV)-clients/done $(VENV)-clients/caldav/done   ## run the tests with a browser and the programs of others: Blazar's, calendars
	export CLIENTS=$(abspath $(VENV)-clients)/bin; $(PYTEST) -m clients cmres_test.py
	$(PYTEST) --assert=plain -n 3 --dist worksteal -m browser cmres_test.py

stress: $(VENV)/cmres_test $(VENV)/psycopg   ## on both engines, let 64 clients reserve 100000 times, and kill what can be killed 100 times
	$(BIN)/python cmres_test.py stress ruin

bench: $(VENV)/cmres_test $(VENV)-clients/caldav/done   ## print how fast it is, as ratios measured side by side
	CLIENTS=$(abspath $(VENV)-clients)/bin $(BIN)/python cmres_test.py

clean:           ## remove the environment and what tests left
	rm -rf $(VENV) $(VENV)-clients .pytest_cache .hypothesis __pycache__

# A stamp holds the dependencies of a script's head: pip runs when they change, not at every edit.
$(VENV)/%: %.py FORCE | $(BIN)/python
	@sed -n '/^# \/\/\/$$/q; s/^#   "\([^"]*\)",.*/\1/p' $< > $@.new
	@cmp -s $@.new $@ && rm $@.new || { $(BIN)/python -m pip install -q --disable-pip-version-check -r $@.new && mv $@.new $@; }

$(VENV)/cmres_test: $(VENV)/cmres

$(VENV)/psycopg: | $(BIN)/python   # for a database in PostgreSQL alone
	$(BIN)/python -m pip install -q --disable-pip-version-check 'psycopg[binary]>=3.2,<4' && touch $@

$(BIN)/cmres: | $(BIN)/python   # the same program under a short name, compiled once
	@printf '#!%s -Xno_debug_ranges\nimport gc, sys\ngc.disable()\nsys.path.insert(0, "%s")\nfrom cmres import run_program\nrun_program()\n' \
	  '$(abspath $(BIN))/python' '$(CURDIR)' > $@ && chmod +x $@

$(VENV)-clients/done: | $(BIN)/python   # an environment of their own; the suite needs no tempest
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check python-openstackclient~=10.5 python-blazarclient~=4.6 gabbi~=4.2
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps blazar-tempest-plugin==0.19.0
	touch $@

$(VENV)-clients/caldav/done: | $(VENV)-clients/done   # python-caldav and its own suite; Radicale, to be measured against
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check caldav==3.6.0 'pytest>=8,<10' pytest-asyncio proxy.py pyfakefs tzlocal vobject radicale~=3.9
	$(@D)/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-binary caldav -d $(@D) caldav==3.6.0
	mkdir $(@D)/suite && tar xzf $(@D)/caldav-*.tar.gz -C $(@D)/suite --strip-components 1
	touch $@

$(VENV)-clients/horizon/done: | $(VENV)-clients/done   # OpenStack's dashboard with Blazar's panel
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check horizon~=27.0 blazar-dashboard~=16.0
	cd $(@D)/lib/python3*/site-packages && cp blazar_dashboard/enabled/_9*.py openstack_dashboard/local/enabled/
	touch $@

$(VENV)-clients/tempest/done: | $(VENV)-clients/done   # OpenStack's own tests, with Blazar's scenarios
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check tempest~=47.0
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps blazar-tempest-plugin==0.19.0
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

.PHONY: help serve test test-postgres test-openstack test-clients bench stress clean FORCE
