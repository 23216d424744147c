# shellcheck shell=bash
# What an API server says of every values file and of every value that is chosen from a list.

namespace apply
"$PYTHON" "$here/apply.py" "$CHART" "$NS" || fail "the API server refuses what the schema allows"
remove_namespace "$NS"
