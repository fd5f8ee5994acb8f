# Kari's image, built where there is Docker, Podman or BuildKit and a registry:
#
#   docker build --tag REPOSITORY:TAG .
#
# `make image` makes the same without either, by the same script.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      binutils ca-certificates git libnss-systemd openssh-client python3 systemd
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin kari
RUN hack/image-root.sh /image target/release/kari

# Nothing but the program, what it calls, and their libraries: no package manager,
# and no shell tools beyond sh.
FROM scratch
COPY --from=build /image /
ENV PATH=/usr/local/bin:/usr/bin:/bin
ENTRYPOINT ["/usr/bin/kari"]
LABEL org.opencontainers.image.title=kari \
      org.opencontainers.image.licenses=Apache-2.0
