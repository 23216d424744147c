# shellcheck shell=bash
# What the cases share. Sourced by tests/compose/run, which sets API, WORK and PROJECT.

say() { printf 'compose: %s\n' "$*"; }
fail() {
  say "FAILED: $*" >&2
  exit 1
}
equal() { # equal FOUND EXPECTED WHAT
  [ "$1" = "$2" ] || fail "$3 is \"$1\", not \"$2\""
  say "$3: $1"
}
seconds() { date +%s.%N; }
since() { python3 -c 'import sys, time; print(f"{time.time() - float(sys.argv[1]):.1f}")' "$1"; }
json() { python3 -c 'import json, sys; d = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Every profile, so that `down`, `ps` and `logs` see all; `up` of named services starts only those and what they need.
compose() { docker compose --profile split --profile observability "$@"; }
container() { compose ps --all --quiet "$1"; }
inspect() { docker inspect --format "$2" "$(container "$1")"; }

sql() { compose exec -T postgres psql --username trellis --dbname trellis --tuples-only --no-align --command "$1"; }

start_order() { # start_order ORDER PAYMENT [REVIEW_SECONDS]
  curl --fail-with-body -sS -X POST "$API/orders/$1/start" -H 'content-type: application/json' \
    -d "{\"payment_id\":\"$2\",\"review_timeout_seconds\":${3:-60}}" >/dev/null || fail "start of $1"
}
approve() { curl --fail-with-body -sS -X POST "$API/orders/$1/signals/approve" >/dev/null || fail "approval of $1"; }
step() { curl -sS "$API/orders/$1/status" | json 'd.get("step")' 2>/dev/null || echo unknown; }

until_true() { # until_true SECONDS WHAT COMMAND…
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || fail "$what"
    sleep 0.3
  done
}
is_at() { [ "$(step "$1" 2>/dev/null)" = "$2" ]; }
until_step() { until_true "${3:-60}" "$1 does not get to $2 in ${3:-60} s; it is $(step "$1")" is_at "$1" "$2"; }
is_healthy() { [ "$(inspect "$1" '{{.State.Health.Status}}')" = healthy ]; }
until_healthy() { until_true "${2:-90}" "$1 does not become healthy in ${2:-90} s" is_healthy "$1"; }

# The provider's own books, which know nothing of the product's.
charges() { sql "SELECT count(*) FROM sandbox.charges WHERE payment = '$1'"; }
charged_once() { equal "$(charges "$1")" 1 "charges of $1 in the provider's books"; }
