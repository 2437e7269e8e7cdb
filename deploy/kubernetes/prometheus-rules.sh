#!/bin/sh
# Prints the rules of deploy/prometheus/rules/ as PrometheusRules for the Prometheus Operator, one
# of each file, so that there is no second copy of them:
#
#     sh deploy/kubernetes/prometheus-rules.sh | kubectl apply --namespace deshift -f -
#
# Labels that the Operator's ruleSelector asks for are arguments: release=kube-prometheus-stack
set -eu
rules=$(dirname "$0")/../prometheus/rules
for file in "$rules"/*.yml; do
  cat <<HEAD
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: deshift-$(basename "$file" .yml)
  labels:
    app.kubernetes.io/part-of: deshift
HEAD
  for label; do
    printf '    %s: "%s"\n' "${label%%=*}" "${label#*=}"
  done
  echo spec:
  sed -e 's/^/  /' "$file"
done
