#!/bin/sh
# Creates namespaces and search attributes that are missing, and sets the retention where it differs.
# NAMESPACES: "name seconds" per line. SEARCH_ATTRIBUTES: "name type" per line.
set -eu
trap 'exit 143' TERM

# With a limit: a call that got lost would be waited for without end.
operator() { temporal operator "$@" --command-timeout 30s; }

n=0
until out=$(operator cluster health 2>&1); do
  [ $((n % 15)) -ne 0 ] || printf 'waiting for Temporal at %s\n%s\n' "${TEMPORAL_ADDRESS##*/}" "$out"
  n=$((n + 1))
  sleep 2
done

retry() { # COMMAND…: what has just been made is not known to every part of the server for some seconds
  for n in 1 2 3 4 5 6 7 8 9 10; do
    if "$@"; then return; fi
    sleep 3
  done
  echo "gave up: $*"
  exit 1
}

namespace() { # NAME SECONDS
  if ! found=$(operator namespace describe --namespace "$1" --output json 2>&1); then
    case $found in *"not found"*) ;; *) echo "$found"; return 1 ;; esac
    operator namespace create --namespace "$1" --retention "$2s" || return 1
    echo "namespace $1: created"
  elif printf '%s' "$found" | grep -q "\"workflowExecutionRetentionTtl\": *\"$2s\""; then
    echo "namespace $1: as wanted"
  else
    operator namespace update --namespace "$1" --retention "$2s" || return 1
    echo "namespace $1: retention set to $2 s"
  fi
}

attribute() { # NAMESPACE NAME TYPE
  found=$(operator search-attribute list --namespace "$1" --output json) || return 1
  if printf '%s' "$found" | grep -q "\"$2\":"; then
    echo "search attribute $2 in $1: exists"
  else
    operator search-attribute create --namespace "$1" --name "$2" --type "$3" || return 1
    echo "search attribute $2 in $1: created"
  fi
}

printf '%s\n' "$NAMESPACES" | while read -r name seconds; do
  [ -n "$name" ] || continue
  retry namespace "$name" "$seconds"
  printf '%s\n' "$SEARCH_ATTRIBUTES" | while read -r attribute type; do
    [ -z "$attribute" ] || retry attribute "$name" "$attribute" "$type"
  done
done
