use k8s_openapi::api::core::v1::Namespace;
use kube::api::{Api, ObjectMeta, PostParams};
pub async fn api_server() -> kube::Client {
    kube::Client::try_default().await.expect("client")
}
pub async fn namespace(client: &kube::Client) -> String {
    let name = format!("t-{}", &uuid::Uuid::new_v4().to_string()[..8]);
    let namespaces: Api<Namespace> = Api::all(client.clone());
    namespaces
        .create(
            &PostParams::default(),
            &Namespace {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    ..Default::default()
                },
                ..Default::default()
            },
        )
        .await
        .expect("namespace");
    name
}
