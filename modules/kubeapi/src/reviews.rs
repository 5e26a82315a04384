//! Questions that are asked by creating something: may I, may they, who am I, whose token is this.

use serde_json::{Value, json as value};

use crate::{
    api::{Api, Ask, Done, Validation, read},
    authz::{self, Attributes},
    clock, json,
    status::Status,
    user::{AUTHENTICATED, User},
};

/// Answers a review.
pub(crate) fn answer(api: &Api, ask: &Ask, body: Value) -> Result<Done, Status> {
    let plain = Ask { validation: Validation::Ignore, ..ask.clone() };
    let mut review = read::object_of(&plain, body, &mut Vec::new())?;
    let status = match ask.resource.plural.as_str() {
        "selfsubjectreviews" => {
            json::set(&mut review, "metadata.creationTimestamp", clock::now());
            value!({"userInfo": ask.user.to_value()})
        }
        "selfsubjectaccessreviews" => allowed(api, &ask.user, &review),
        "subjectaccessreviews" | "localsubjectaccessreviews" => {
            if ask.resource.namespaced
                && json::text(&review, "spec.resourceAttributes.namespace") != ask.namespace
            {
                return Err(Status::bad_request(
                    "spec.resourceAttributes.namespace must match metadata.namespace",
                ));
            }
            allowed(api, &asked_about(&review), &review)
        }
        "selfsubjectrulesreviews" => rules(api, &ask.user, json::text(&review, "spec.namespace")),
        "tokenreviews" => token(api, &review),
        _ => return Err(Status::resource_not_found()),
    };
    if ask.resource.plural == "selfsubjectrulesreviews" {
        json::set(&mut review, "spec", value!({}));
    }
    json::set(&mut review, "status", status);
    Ok(Done::created(review))
}

fn allowed(api: &Api, user: &User, review: &Value) -> Value {
    let at = |field: &str| json::text(review, &format!("spec.resourceAttributes.{field}")).to_owned();
    let path = json::text(review, "spec.nonResourceAttributes.path");
    let wanted = if path.is_empty() {
        Attributes {
            verb: at("verb"),
            group: at("group"),
            resource: at("resource"),
            subresource: at("subresource"),
            namespace: at("namespace"),
            name: at("name"),
            path: String::new(),
        }
    } else {
        Attributes {
            verb: json::text(review, "spec.nonResourceAttributes.verb").to_owned(),
            path: path.to_owned(),
            ..Attributes::default()
        }
    };
    value!({"allowed": authz::allows(&api.cache, user, &wanted)})
}

fn asked_about(review: &Value) -> User {
    let groups = json::list(review, "spec.groups").iter().filter_map(Value::as_str);
    User {
        name: json::text(review, "spec.user").to_owned(),
        uid: json::text(review, "spec.uid").to_owned(),
        groups: groups.map(str::to_owned).collect(),
        ..User::default()
    }
}

fn rules(api: &Api, user: &User, namespace: &str) -> Value {
    let all = authz::rules(&api.cache, user, namespace);
    let (paths, resources): (Vec<Value>, Vec<Value>) =
        all.into_iter().partition(|rule| !json::list(rule, "nonResourceURLs").is_empty());
    value!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
}

fn token(api: &Api, review: &Value) -> Value {
    let audiences = json::list(review, "spec.audiences").iter().filter_map(Value::as_str);
    let audiences: Vec<String> = audiences.map(str::to_owned).collect();
    let token = json::text(review, "spec.token");
    match api.authenticator.of_token(&api.cache, token, &audiences) {
        Some(mut user) => {
            if !user.is_in(AUTHENTICATED) {
                user.groups.push(AUTHENTICATED.to_owned());
            }
            let mut status = value!({"authenticated": true, "user": user.to_value()});
            if !audiences.is_empty() {
                status["audiences"] = value!(audiences);
            }
            status
        }
        None => value!({"authenticated": false, "error": "invalid bearer token"}),
    }
}
