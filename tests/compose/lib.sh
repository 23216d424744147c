# shellcheck shell=bash
# What the cases share. Sourced by tests/compose/run, which sets API, WORK, PROJECT and the repository's place.

SUITE=compose
# shellcheck source=tests/lib.sh
source "$repository/tests/lib.sh"

# Every profile, so that `down`, `ps` and `logs` see all; `up` of named services starts only those and what they need.
compose() { docker compose --profile split --profile observability "$@"; }
container() { compose ps --all --quiet "$1"; }
inspect() { docker inspect --format "$2" "$(container "$1")"; }

sql() { compose exec -T postgres psql --username trellis --dbname trellis --tuples-only --no-align --command "$1"; }

is_healthy() { [ "$(inspect "$1" '{{.State.Health.Status}}')" = healthy ]; }
until_healthy() { until_true "${2:-90}" "$1 does not become healthy in ${2:-90} s" is_healthy "$1"; }
