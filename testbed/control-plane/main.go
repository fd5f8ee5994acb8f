// Command control-plane is one binary with the whole of Kubernetes that Kari's
// demo, tests and benches run against:
//
//	control-plane etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|kube-proxy|kubectl|helm ARGS
//	control-plane coredns COREFILE
//
// The component is the name the binary was called by, or else its first
// argument. One program instead of nine: they share nearly all of their code,
// so that it builds in a fraction of the time and of the disk space.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	helm "helm.sh/helm/v4/pkg/cmd"
	helmkube "helm.sh/helm/v4/pkg/kube"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// components maps the name of each component to the function that runs it and
// returns its exit status. The arguments are in os.Args, as its own main would
// find them.
var components = map[string]func() int{
	"etcd":                    runEtcd,
	"kube-apiserver":          cobraCommand(apiserver.NewAPIServerCommand),
	"kube-controller-manager": cobraCommand(controllermanager.NewControllerManagerCommand),
	"kube-scheduler":          cobraCommand(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kubelet":                 cobraCommand(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
	"kube-proxy":              cobraCommand(proxy.NewProxyCommand),
	"kubectl":                 cobraCommand(kubectl.NewDefaultKubectlCommand),
	"helm":                    runHelm,
	"coredns":                 runCoreDNS,
}

func main() {
	name := filepath.Base(os.Args[0])
	if _, ok := components[name]; !ok && len(os.Args) > 1 {
		name = os.Args[1]
		os.Args = os.Args[1:]
	}
	run, ok := components[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "control-plane: %q is none of its components; see the head of main.go\n", name)
		os.Exit(2)
	}
	os.Exit(run())
}

func cobraCommand(build func() *cobra.Command) func() int {
	return func() int { return cli.Run(build()) }
}

func runEtcd() int {
	etcdmain.Main(append([]string{"etcd"}, os.Args[1:]...))
	return 0
}

func runHelm() int {
	helmkube.ManagedFieldsManager = "helm"
	command, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err != nil {
		fmt.Fprintln(os.Stderr, "helm:", err)
		return 1
	}
	if err := command.Execute(); err != nil {
		if exit, ok := errors.AsType[helm.CommandError](err); ok {
			return exit.ExitCode
		}
		return 1
	}
	return 0
}

// runCoreDNS serves the zone of a cluster, with no more plugins than that takes:
// those of CoreDNS's own main bring the clients of three clouds along.
func runCoreDNS() int {
	if err := serveDNS(); err != nil {
		fmt.Fprintln(os.Stderr, "coredns:", err)
		return 1
	}
	return 0
}

func serveDNS() error {
	if len(os.Args) != 2 {
		return errors.New("name the Corefile, and nothing else")
	}
	content, err := os.ReadFile(os.Args[1])
	if err != nil {
		return err
	}
	if err := dnsserver.Register(); err != nil {
		return err
	}
	caddy.TrapSignals()
	instance, err := caddy.Start(caddy.CaddyfileInput{
		Filepath:       os.Args[1],
		Contents:       content,
		ServerTypeName: "dns",
	})
	if err != nil {
		return err
	}
	instance.Wait()
	return nil
}
