#!/usr/bin/env bash
# The startup probe: asked again until the server accepts connections and roles.sql has run, never afterwards.
# Not a postStart hook: as long as that waits, the pod cannot be deleted.
set -euo pipefail
# By TCP: while a new data folder is made, a server without TCP answers on the socket.
pg_isready -q -h 127.0.0.1 || { echo "the server does not accept connections yet"; exit 1; }
# What a probe prints is only in the pod's events, and only when it fails: write to the log of the container as well.
log=/dev/null
if { : >>/proc/1/fd/1; } 2>/dev/null; then log=/proc/1/fd/1; fi
# Everybody who connects reads the password with it, but psql below reads it without.
for file in "$PASSWORDS"/*-password; do
  if [ -n "$(tail -c 1 "$file" | tr -d -c '\n' | tr '\n' x)" ]; then
    echo "the key ${file##*/} of the Secret ends with a line feed: make the Secret again without it, such as by --from-literal" | tee -a "$log"
    exit 1
  fi
done
psql -X -q -U postgres -d postgres -v sandbox="$SANDBOX" -f /etc/trellis/roles.sql 2>&1 | tee -a "$log" || {
  echo "roles.sql failed, see above; tried again" | tee -a "$log"
  exit 1
}
echo "roles.sql: databases, roles and grants are as wanted" | tee -a "$log"
