// Feed answers with a greeting, and is built with a router from the module
// proxy: what an application with dependencies looks like.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
)

func main() {
	log.SetFlags(0) // the journal has the time
	port := os.Getenv("PORT")
	if port == "" {
		log.Fatal("PORT is not set: run as PORT=8080 ./feed")
	}

	router := chi.NewRouter()
	router.Use(middleware.Recoverer, middleware.Timeout(10*time.Second))
	router.Get("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	router.Get("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "a feed, built with packages") })
	router.Get("/items/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "item %s\n", chi.URLParam(r, "id"))
	})

	server := &http.Server{Addr: net.JoinHostPort("127.0.0.1", port), Handler: router, ReadHeaderTimeout: 5 * time.Second}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	drained := make(chan error, 1)
	go func() {
		<-stop.Done()
		deadline, cancel := context.WithTimeout(context.Background(), 25*time.Second)
		defer cancel()
		drained <- server.Shutdown(deadline)
	}()
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
	if err := <-drained; err != nil {
		log.Fatal(err)
	}
}
