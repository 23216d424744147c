# shellcheck shell=bash
# The profile `split` without the container that does everything: migration first, then one container per role.

compose stop trellis_app 2>/dev/null
began=$(seconds)
docker compose --profile split up --scale trellis_app=0 --wait --detach 2>/dev/null
say "up: $(since "$began") s"
equal "$(inspect migrate '{{.State.ExitCode}}')" 0 "exit code of the migration"
export API=http://localhost:$SPLIT_API_PORT
start_order split-1 pay-split-1
until_step split-1 awaiting_review
approve split-1
until_step split-1 shipped
charged_once pay-split-1
docker stats --no-stream --format 'compose: {{.Name}} {{.MemUsage}}' \
  "$(container api)" "$(container worker-default)" "$(container worker-shipping)"
# A worker that cannot reach its servers is not ready, and says what it waits for.
compose stop temporal 2>/dev/null
if compose exec -T worker-default python -m app.cli.healthcheck http://127.0.0.1:9464/readyz; then
  fail "a worker without Temporal calls itself ready"
fi
compose exec -T worker-default python -m app.cli.healthcheck || fail "a worker without Temporal is not even alive"
compose start temporal 2>/dev/null
until_healthy worker-default
compose rm --force --stop api worker-default worker-shipping migrate >/dev/null 2>&1
compose up --wait --detach trellis_app 2>/dev/null
