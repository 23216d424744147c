# shellcheck shell=bash
# The test suite in the container, against the running servers, whose own data it leaves as they are.

# Something that could be lost, whichever cases came before.
start_order tests-1 pay-tests-1 3600
until_step tests-1 awaiting_review

state() {
  sql 'SELECT count(*), max(id) FROM events'
  sql 'SELECT count(*) FROM orders'
  sql "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database"
}
before=$(state)
# The exact line of the contract; -T because there may be no terminal here. In two processes, to save time: three would
# need more memory than the container has.
compose exec -T --env PYTEST_ADDOPTS="-p no:cacheprovider -o tmp_path_retention_policy=none -n 2 --dist worksteal" trellis_app pytest -q || fail "pytest in the container"
equal "$(state)" "$before" "events, orders and databases after the tests"
