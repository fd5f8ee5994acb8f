// Hello answers with a greeting and says which commit is running and where.
//
// Configuration comes from the environment: PORT is set by Kari, GREETING by
// the manifest. On SIGTERM it takes no new requests, finishes those in flight
// and ends.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// Below the manifest's terminationGracePeriodSeconds, so that the log can say
// what was cut off before systemd ends the process.
const drainTimeout = 25 * time.Second

// No caller may hold a connection for longer than this with /slow.
const longestSlow = 10 * time.Second

func main() {
	log.SetFlags(0) // the journal has the time
	port := os.Getenv("PORT")
	if port == "" {
		log.Fatal("PORT is not set: run as PORT=8080 ./hello")
	}

	server := &http.Server{
		Addr:              net.JoinHostPort("127.0.0.1", port),
		Handler:           routes(environment("GREETING", "Hello")),
		ReadHeaderTimeout: 5 * time.Second,
	}

	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	drained := make(chan error, 1)
	go func() {
		<-stop.Done()
		log.Print("stopping: finishing the requests in flight")
		deadline, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		drained <- server.Shutdown(deadline)
	}()

	log.Printf("listening on %s", server.Addr)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	if err := <-drained; err != nil {
		log.Fatalf("requests were cut off after %s: %v", drainTimeout, err)
	}
	log.Print("stopped")
}

func routes(greeting string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/version", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{
			"commit": environment("KARI_COMMIT", "unknown"),
			"node":   environment("KARI_NODE", "unknown"),
		})
	})
	// Stands for real work: a request that is in flight for a while.
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		milliseconds, err := strconv.Atoi(r.URL.Query().Get("milliseconds"))
		duration := time.Duration(milliseconds) * time.Millisecond
		if err != nil || duration < 0 || duration > longestSlow {
			http.Error(w, "milliseconds must be a number from 0 to 10000", http.StatusBadRequest)
			return
		}
		time.Sleep(duration)
		fmt.Fprintln(w, "done")
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintf(w, "%s from Go on %s, commit %.7s\n",
			greeting, environment("KARI_NODE", "this machine"), environment("KARI_COMMIT", "unknown"))
	})
	return mux
}

func environment(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}
