# shellcheck shell=bash
# What tests/compose and tests/cluster share. Sourced by their own lib.sh, which sets SUITE and defines `sql`.

say() { printf '%s: %s\n' "$SUITE" "$*"; }
fail() {
  say "FAILED: $*" >&2
  [ -z "${WORK:-}" ] || echo "$*" >>"$WORK/failed"
  exit 1
}
# A command that fails by itself says which one it was; `set -e` would end the run without a word.
set -o errtrace
trap 'unexpected $? "$BASH_COMMAND" "${BASH_SOURCE[0]##*/}" $LINENO' ERR
unexpected() { # unexpected CODE COMMAND FILE LINE
  [ -z "${WORK:-}" ] || echo "$3 line $4: exit code $1 of $2" >>"$WORK/unexpected"
}
failed() { # failed CASE: last of all, after the evidence, which is long
  local why='a command failed'
  if [ -s "$WORK/failed" ]; then
    why=$(cut -c 1-600 "$WORK/failed")
  elif [ -s "$WORK/unexpected" ]; then
    # The innermost comes first, and then each that it was called from.
    why=$(tail -n 4 "$WORK/unexpected" | cut -c 1-300)
  fi
  say "FAILED: case $1: $why" >&2
}
equal() { # equal FOUND EXPECTED WHAT
  [ "$1" = "$2" ] || fail "$3 is \"$1\", not \"$2\""
  say "$3: $1"
}
seconds() { date +%s.%N; }
since() { python3 -c 'import sys, time; print(f"{time.time() - float(sys.argv[1]):.1f}")' "$1"; }
json() { python3 -c 'import json, sys; d = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
until_true() { # [because=COMMAND] until_true SECONDS WHAT COMMAND…: with the last lines of the former when it fails
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || fail "$what${because:+: $($because 2>&1 | tail -n 12)}"
    sleep 0.3
  done
}

fresh_clone() { # fresh_clone REPOSITORY TARGET: exactly what git has, or would take, of the work tree
  mkdir "$2"
  (cd "$1" && git ls-files -z --cached --others --exclude-standard) |
    (cd "$1" && tar --create --null --files-from=- --ignore-failed-read 2>/dev/null) |
    tar --extract --directory "$2"
}

# --- orders, at $API

start_order() { # start_order ORDER PAYMENT [REVIEW_SECONDS]
  curl --fail-with-body -sS -X POST "$API/orders/$1/start" -H 'content-type: application/json' \
    -d "{\"payment_id\":\"$2\",\"review_timeout_seconds\":${3:-60}}" >/dev/null || fail "start of $1"
}
approve() { curl --fail-with-body -sS -X POST "$API/orders/$1/signals/approve" >/dev/null || fail "approval of $1"; }
step() { curl -sS --max-time 5 "$API/orders/$1/status" 2>/dev/null | json 'd.get("step")' 2>/dev/null || echo unknown; }
is_at() { [ "$(step "$1")" = "$2" ]; }
until_step() { # until_step ORDER STEP [SECONDS]
  until_true "${3:-60}" "$1 does not get to $2 in ${3:-60} s" is_at "$1" "$2"
}

# The provider's own books, which know nothing of the product's.
charges() { sql "SELECT count(*) FROM sandbox.charges WHERE payment = '$1'"; }
charged_once() { equal "$(charges "$1")" 1 "charges of $1 in the provider's books"; }
