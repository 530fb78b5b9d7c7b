#!/usr/bin/env bash
# Wait for the Kubernetes job of kubernetes.yaml:  bash docs/fleet/wait.sh [JOB [SECONDS]]
# `kubectl wait --for=condition=complete` alone would also wait for a job that has failed, until its time is over.
# Exit status: 0 complete, 1 failed, 124 still running after SECONDS, that of kubectl where it fails.
set -euo pipefail
job=${1:-sd-perf} seconds=${2:-7200}

until ((SECONDS > seconds)); do
    conditions=$(kubectl get job "$job" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    case " $conditions " in
        *" Complete "*) exit 0 ;;
        *" Failed "*)
            echo "wait.sh: $job failed: kubectl logs --prefix -l app=$job" >&2
            exit 1
            ;;
    esac
    sleep "${SD_PERF_POLL_SECONDS:-10}"
done
echo "wait.sh: $job still runs after $seconds s" >&2
exit 124
