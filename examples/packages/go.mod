module example.com/feed

go 1.21

require github.com/go-chi/chi/v5 v5.1.0
