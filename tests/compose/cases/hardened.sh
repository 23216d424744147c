# shellcheck shell=bash
# The image that ships, with nothing a container could go without; under its own uid and under one nobody has heard of.

network=$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}' "$(container postgres)")
for uid in 10001 4711; do
  name=$PROJECT-hardened-$uid
  began=$(seconds)
  docker run --detach --name "$name" --network "$network" \
    --read-only --cap-drop ALL --security-opt no-new-privileges --user "$uid" --tmpfs /tmp \
    --env TRELLIS_DATABASE_URL=postgresql://trellis:trellis@postgres:5432/trellis?sslmode=disable \
    --env TRELLIS_TEMPORAL_ADDRESS=temporal:7233 \
    --env TRELLIS_SANDBOX=true \
    "$TRELLIS_IMAGE" run-all >/dev/null
  answers() { docker exec "$name" python -m app.cli.healthcheck http://127.0.0.1:8000/readyz 2>/dev/null; }
  because="docker logs $name" until_true 60 "$name does not get ready" answers
  say "uid $uid: ready $(since "$began") s after docker run"
  # `trellis` in the container drives an order through its own API.
  docker exec "$name" trellis order start "hardened-$uid" --review-timeout 60 >/dev/null
  until_step "hardened-$uid" awaiting_review
  docker exec "$name" trellis order approve "hardened-$uid" >/dev/null
  until_step "hardened-$uid" shipped
  docker stop "$name" >/dev/null
  equal "$(docker inspect --format '{{.State.ExitCode}}' "$name")" 0 "exit code"
  equal "$(docker diff "$name" | grep -c -v -E '^(A|C) /(tmp|etc|etc/mtab|proc|sys|dev)$')" 0 "files written outside of /tmp"
  docker rm "$name" >/dev/null
done
