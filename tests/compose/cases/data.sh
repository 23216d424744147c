# shellcheck shell=bash
# `down` keeps the data, `down -v` removes them; a port that is taken is told in Docker's own words.

start_order data-1 pay-data-1 300
until_step data-1 awaiting_review
compose down --timeout 30 2>/dev/null
docker compose up --wait --detach 2>/dev/null
equal "$(step data-1)" awaiting_review "the order after down and up"
approve data-1
until_step data-1 shipped
charged_once pay-data-1

compose down --volumes --timeout 30 2>/dev/null
equal "$(docker volume ls --quiet --filter "label=com.docker.compose.project=$PROJECT")" '' "volumes after down -v"

python3 -m http.server --bind 127.0.0.1 "$API_PORT" >/dev/null 2>&1 &
listener=$!
trap 'kill "$listener"' EXIT
until_true 10 "the listener does not listen" curl -s -o "$WORK/ignored" "$API"
if docker compose up --wait --detach >"$WORK/taken" 2>&1; then
  fail "it starts although the port is taken"
fi
grep -E 'address already in use|port is already allocated' "$WORK/taken" || fail "no clear word about the taken port"

# As it was found, for the cases that follow.
kill "$listener"
trap - EXIT
wait "$listener" 2>/dev/null || true
docker compose up --wait --detach 2>/dev/null || fail "up once the port is free"
