#!/usr/bin/env bash
# The startup probe: asked again until the server accepts connections and roles.sql has run, never afterwards.
# Not a postStart hook: as long as that waits, the pod cannot be deleted.
set -euo pipefail
# By TCP: while a new data folder is made, a server without TCP answers on the socket.
pg_isready -q -h 127.0.0.1 || { echo "the server does not accept connections yet"; exit 1; }
exec bash "${BASH_SOURCE%/*}/roles.sh"
