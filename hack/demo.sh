#!/usr/bin/env bash
# What `make demo` shows: a control plane and three nodes on this machine, an
# application from a git push to an answer through each node's proxy, and a
# second commit. Stays until Ctrl-C; with HOLD=0 it ends by itself.
set -euo pipefail

# shellcheck source=hack/testbed-session.sh
source "$(dirname "$0")/testbed-session.sh"

readonly nodes=(n1 n2 n3)
readonly host=python.example.com

heading "1. A Kubernetes control plane, three nodes with systemd, Kari's controller and agents"
say "   (the very first time, the control plane is built from source: 5 to 10 minutes)"
begin_testbed --nodes "${#nodes[@]}"
run kubectl get nodes

heading "2. A git push: examples/python becomes the repository hello-python"
app=$session_dir/hello-python
cp -r "$repository/examples/python" "$app"
{ read -r url; read -r commit; } < <(testbed git hello-python "$app" --message "Say hello")
say "   $url, commit ${commit:0:7}"

heading "3. kubectl apply: its manifest, with that URL"
sed "s#https://git.example.com/hello-python.git#$url#" "$app/deployment.yaml" >"$session_dir/deployment.yaml"
sed 's/^/   /' "$session_dir/deployment.yaml"
run kubectl apply -f "$session_dir/deployment.yaml"
follow_rollout hello-python "$commit"
run kubectl get kd,krel

heading "4. A request through the proxy of each node"
declare -A proxies
for node in "${nodes[@]}"; do
    proxies[$node]=$(proxy_of "$node")
done
ask() { curl --silent --max-time 5 --header "Host: $host" "http://${proxies[$1]}$2" "${@:3}"; }
ask_each_node() {
    for node in "${nodes[@]}"; do
        printf '   %s, %s: ' "$node" "${proxies[$node]}"
        ask "$node" / --show-error --fail
    done
}
ask_each_node

heading "5. A second commit, while each proxy is asked ten times a second"
sed -i 's/from Python on/from the second commit on/' "$app/hello/server.py"
{ read -r url; read -r commit; } < <(testbed git hello-python "$app" --message "Greet from the second commit")
say "   commit ${commit:0:7}"
asked_enough=$session_dir/asked-enough
keep_asking() {
    until [[ -e $asked_enough ]]; do
        ask "$1" / --output /dev/null --write-out '%{http_code}\n' || true
        sleep 0.1
    done
}
for node in "${nodes[@]}"; do
    keep_asking "$node" >"$session_dir/answers-$node" &
done
# Kari looks at the repository each minute; this says: now.
run kubectl annotate kd/hello-python --overwrite "kari.dev/requestedAt=$(date --utc +%FT%TZ)"
follow_rollout hello-python "$commit"
touch "$asked_enough"
wait
asked=$(cat "$session_dir"/answers-* | wc -l)
failed=$(cat "$session_dir"/answers-* | grep -cv '^200$' || true)
say "   $asked requests meanwhile, $failed failed"
ask_each_node
run kubectl get kd,krel
((failed == 0)) || { say "requests failed during the switch" >&2; exit 1; }

if [[ ${HOLD:-1} == 0 ]]; then
    exit
fi

heading "All of this runs until Ctrl-C. In another shell, as root:"
cat <<END
   export KUBECONFIG=$KUBECONFIG PATH=$testbed_dir/bin:${CARGO_TARGET_DIR:-$repository/target}/debug:\$PATH

   kubectl get kd,krel -w                              # leave it running while you try the rest
   kubectl describe kd hello-python                    # what it is, and why
   kubectl explain kd.spec.processes                   # what a manifest can say
   testbed exec n1 --dir $testbed_dir -- systemctl list-units 'kari*'    # what a node runs
   curl -H 'Host: $host' http://${proxies[n1]}/version        # through the proxy of n1
   testbed status --dir $testbed_dir        # each part, where it answers, and its log

   # change the application: edit $app/hello/server.py, then
   testbed git hello-python $app --dir $testbed_dir
   kubectl annotate kd/hello-python --overwrite kari.dev/requestedAt=\$(date +%s)

   # (with a syntax error the build fails, says why, and the old release keeps serving)

   kubectl delete kd hello-python                      # and the nodes are as they were
END
sleep infinity &
wait
