#!/usr/bin/env bash
# Makes databases, roles and grants as roles.sql says, with the passwords that are mounted now.
set -euo pipefail
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
cat "$PASSWORDS"/*-password | sha256sum >${TMPDIR:-/tmp}/passwords.taken
echo "roles.sql: databases, roles and grants are as wanted" | tee -a "$log"
