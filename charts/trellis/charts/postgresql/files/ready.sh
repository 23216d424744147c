#!/usr/bin/env bash
# The readiness probe. It takes notice of passwords that were changed in the Secret, which Kubernetes mounts anew within a minute or two:
# otherwise the old ones would hold until this pod is restarted, and the new ones nowhere.
set -euo pipefail
pg_isready -q -h 127.0.0.1 || exit 1
now=$(cat "$PASSWORDS"/*-password | sha256sum)
[ "$now" != "$(cat ${TMPDIR:-/tmp}/passwords.taken 2>/dev/null)" ] || exit 0
# What is wrong with new passwords is said once, and the server goes on with the old ones.
[ "$now" != "$(cat ${TMPDIR:-/tmp}/passwords.refused 2>/dev/null)" ] || exit 0
bash "${BASH_SOURCE%/*}/roles.sh" || echo "$now" >${TMPDIR:-/tmp}/passwords.refused
