#!/bin/sh
# Returns when both databases have the schema that the server of this version needs, or a newer one. Changes nothing:
# the tool is given a folder without any update, and says which version it found.
set -eu
trap 'exit 143' TERM
mkdir -p /tmp/none/v0.0

wait_for() { # DATABASE FOLDER
  needed=$(ls "/etc/temporal/schema/postgresql/v12/$2/versioned" | sed -n 's/^v//p' | sort -V | tail -n 1)
  n=0
  while :; do
    if out=$(temporal-sql-tool --database "$1" update-schema --schema-dir /tmp/none 2>&1); then
      found=$(printf '%s\n' "$out" | sed -n 's/.*found zero updates from current version \([0-9.]*[0-9]\).*/\1/p' | tail -n 1)
      # A tool that words it otherwise: let the server judge, which stops when the schema is too old.
      [ -n "$found" ] || { echo "$1: version of the schema not understood, going on"; return; }
      [ "$(printf '%s\n%s\n' "$needed" "$found" | sort -V | head -n 1)" != "$needed" ] || { echo "$1: schema $found, needed $needed"; return; }
      out="schema is at $found"
    fi
    [ $((n % 15)) -ne 0 ] || printf '%s: waiting for schema %s at %s:%s\n%s\n' "$1" "$needed" "$SQL_HOST" "$SQL_PORT" "$out"
    n=$((n + 1))
    sleep 2
  done
}

wait_for "$DATABASE" temporal
wait_for "$VISIBILITY_DATABASE" visibility
