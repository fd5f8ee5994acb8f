{{/* Labels of every object. */}}
{{- define "kari.labels" -}}
app.kubernetes.io/name: kari
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: kari
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What selects the pods of a part: (list . "controller"). */}}
{{- define "kari.selector" -}}
app.kubernetes.io/name: kari
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "kari.image" -}}
{{- $repository := required "set image.repository to where your cluster pulls Kari's image from" .Values.image.repository -}}
{{- if .Values.image.digest -}}
{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ $repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The priority class of a part: (list . "controller"). */}}
{{- define "kari.priorityClass" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
{{- $name := (index $root.Values $part).priorityClassName -}}
{{- if $name -}}
priorityClassName: {{ $name }}
{{- else if $root.Values.priorityClasses.create -}}
priorityClassName: kari-{{ $part }}
{{- end -}}
{{- end }}

{{/* The variables of both parts that say how they log. */}}
{{- define "kari.logging" -}}
- {name: KARI_LOG_FORMAT, value: {{ .Values.log.format | quote }}}
- {name: KARI_LOG_LEVEL, value: {{ .Values.log.level | quote }}}
{{- end }}
