# shellcheck shell=bash
# skaffold.yaml: right by the schema that the project publishes, and what it describes can be done. Where the program
# itself is there, it reads the file and renders every profile.

python3 -m venv "$WORK/skaffold"
"$WORK/skaffold/bin/pip" install --quiet --disable-pip-version-check pyyaml==6.0.3 jsonschema==4.26.0 || fail "PyYAML and jsonschema can not be installed"
schema=
if command -v go >/dev/null && module=$(go mod download -json github.com/GoogleContainerTools/skaffold/v2@v2.16.1 2>/dev/null | json 'd["Dir"]' 2>/dev/null); then
  schema=$module/docs-v2/content/en/schemas/$(sed -n 's,^apiVersion: skaffold/,,p' skaffold.yaml).json
  [ -e "$schema" ] || fail "skaffold has no schema $schema"
else
  skip "skaffold.yaml WAS NOT COMPARED WITH SKAFFOLD'S SCHEMA: no Go, or no module proxy"
fi
"$WORK/skaffold/bin/python" "$here/skaffold.py" skaffold.yaml "$WORK" "$schema" || fail "skaffold.yaml"

# The profiles as helm and kubectl see them; the program above has written down their values files.
for profile in default dev; do
  mapfile -t files <"$WORK/$profile.values"
  helm template trellis charts/trellis "${files[@]/#/--values=}" \
    --set image.repository=trellis,image.tag=content >"$WORK/$profile.rendered" || fail "the chart with the profile $profile"
  grep -q 'image: "\{0,1\}trellis:content' "$WORK/$profile.rendered" || fail "$profile: the built image is not in the chart"
done
grep -q -- '--reload-dir' "$WORK/dev.rendered" || fail "the profile dev does not reload"
if [ -e k8s/kustomization.yaml ]; then
  kubectl kustomize k8s >"$WORK/kustomized" || fail "kubectl kustomize k8s"
else
  skip "THE PROFILE observability WAS NOT RENDERED: k8s/ has no kustomization.yaml"
fi

if command -v skaffold >/dev/null; then
  export SKAFFOLD_UPDATE_CHECK=false
  say "skaffold itself"
  echo '{"builds": [{"imageName": "trellis", "tag": "trellis:content"}]}' >"$WORK/built.json"
  for profile in '' dev observability; do
    skaffold diagnose --yaml-only ${profile:+--profile "$profile"} >"$WORK/diagnosed" 2>&1 || { cat "$WORK/diagnosed"; fail "skaffold diagnose $profile"; }
    skaffold render ${profile:+--profile "$profile"} --build-artifacts "$WORK/built.json" --digest-source tag --offline \
      --output "$WORK/skaffold.yaml" >"$WORK/render" 2>&1 || { cat "$WORK/render"; fail "skaffold render $profile"; }
    # Every image of the product is the one that was built.
    if grep -E '^ *(- )?image: "?trellis(:|"|$)' "$WORK/skaffold.yaml" | grep -v 'trellis:content'; then fail "skaffold left another image"; fi
    say "skaffold render ${profile:-without a profile}: $(grep -c '^kind: ' "$WORK/skaffold.yaml") resources"
  done
else
  skip "SKAFFOLD ITSELF WAS NOT RUN: there is none here; its file was compared with its schema"
fi
