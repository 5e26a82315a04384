//! The table of built-in resources.

use super::{Resource, Scale, Subresource, type_of};
use crate::{names::Names, schema::Type};

/// All of them, in the order in which groups are shown.
pub(super) fn table() -> Vec<Resource> {
    let mut all = core();
    all.extend(workloads());
    all.extend(others());
    all.extend(reviews());
    all.extend(measurements());
    all
}

fn core() -> Vec<Resource> {
    let pod_fields = [
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ];
    let connects = |name, kind| Subresource { name, group: "", version: "", kind, verbs: &["create", "get"] };
    let pod_subresources = [
        connects("attach", "PodAttachOptions"),
        Subresource { name: "binding", group: "", version: "", kind: "Binding", verbs: &["create"] },
        Subresource {
            name: "ephemeralcontainers",
            group: "",
            version: "",
            kind: "Pod",
            verbs: &["get", "patch", "update"],
        },
        Subresource {
            name: "eviction",
            group: "policy",
            version: "v1",
            kind: "Eviction",
            verbs: &["create"],
        },
        connects("exec", "PodExecOptions"),
        Subresource { name: "log", group: "", version: "", kind: "Pod", verbs: &["get"] },
        connects("portforward", "PodPortForwardOptions"),
    ];
    let proxy = Subresource {
        name: "proxy",
        group: "",
        version: "",
        kind: "NodeProxyOptions",
        verbs: &["create", "delete", "get", "patch", "update"],
    };
    let token = Subresource {
        name: "token",
        group: "authentication.k8s.io",
        version: "v1",
        kind: "TokenRequest",
        verbs: &["create"],
    };
    let finalize =
        Subresource { name: "finalize", group: "", version: "", kind: "Namespace", verbs: &["update"] };
    let core = |kind, plural| resource("", "v1", kind, plural);
    vec![
        core("Namespace", "namespaces")
            .cluster()
            .short(&["ns"])
            .status()
            .sub(&[finalize])
            .names(Names::Label)
            .fields(&["status.phase"]),
        core("Node", "nodes").cluster().short(&["no"]).status().sub(&[proxy]).fields(&["spec.unschedulable"]),
        core("Pod", "pods")
            .short(&["po"])
            .all()
            .status()
            .sub(&pod_subresources)
            .fields(&pod_fields)
            .counted()
            .returns_deleted(),
        core("Service", "services")
            .short(&["svc"])
            .all()
            .status()
            .names(Names::Label1035)
            .fields(&["spec.clusterIP", "spec.type"])
            .returns_deleted(),
        core("Endpoints", "endpoints").short(&["ep"]).singular("endpoints"),
        core("ConfigMap", "configmaps").short(&["cm"]),
        core("Secret", "secrets").fields(&["type"]),
        core("ServiceAccount", "serviceaccounts").short(&["sa"]).sub(&[token]).returns_deleted(),
        core("Event", "events").short(&["ev"]).fields(&EVENT_FIELDS),
        core("PersistentVolume", "persistentvolumes").cluster().short(&["pv"]).status(),
        core("PersistentVolumeClaim", "persistentvolumeclaims").short(&["pvc"]).status().returns_deleted(),
        core("LimitRange", "limitranges").short(&["limits"]),
        core("ResourceQuota", "resourcequotas").short(&["quota"]).status().returns_deleted(),
        core("PodTemplate", "podtemplates").returns_deleted(),
    ]
}

const EVENT_FIELDS: [&str; 12] = [
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
    "message",
];

fn workloads() -> Vec<Resource> {
    let apps = |kind, plural| resource("apps", "v1", kind, plural).all().status().counted();
    let batch = |kind, plural| resource("batch", "v1", kind, plural).all().status().counted();
    vec![
        apps("Deployment", "deployments").short(&["deploy"]).scale(),
        apps("ReplicaSet", "replicasets").short(&["rs"]).scale().fields(&["status.replicas"]),
        apps("DaemonSet", "daemonsets").short(&["ds"]),
        apps("StatefulSet", "statefulsets").short(&["sts"]).scale(),
        resource("apps", "v1", "ControllerRevision", "controllerrevisions"),
        batch("Job", "jobs").fields(&["status.successful"]),
        batch("CronJob", "cronjobs").short(&["cj"]),
        resource("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
            .short(&["pdb"])
            .status()
            .counted(),
    ]
}

fn others() -> Vec<Resource> {
    let rbac =
        |kind, plural| resource("rbac.authorization.k8s.io", "v1", kind, plural).names(Names::PathSegment);
    let mut events = resource("events.k8s.io", "v1", "Event", "events").short(&["ev"]).fields(&EVENT_FIELDS);
    events.stored_as = Some(("", "events"));
    let storage = resource("storage.k8s.io", "v1", "StorageClass", "storageclasses");
    let crd = resource("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions");
    let mut crd = crd.cluster().short(&["crd", "crds"]).status().counted();
    crd.categories = vec!["api-extensions".to_owned()];
    vec![
        events,
        resource("coordination.k8s.io", "v1", "Lease", "leases").fields(&[]),
        resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices").counted(),
        rbac("ClusterRoleBinding", "clusterrolebindings").cluster(),
        rbac("ClusterRole", "clusterroles").cluster(),
        rbac("RoleBinding", "rolebindings"),
        rbac("Role", "roles"),
        crd,
        storage.cluster().short(&["sc"]).singular("storageclass"),
        resource("scheduling.k8s.io", "v1", "PriorityClass", "priorityclasses")
            .cluster()
            .short(&["pc"])
            .singular("priorityclass")
            .counted(),
        resource("networking.k8s.io", "v1", "IngressClass", "ingressclasses")
            .cluster()
            .singular("ingressclass")
            .counted(),
        resource("networking.k8s.io", "v1", "Ingress", "ingresses")
            .short(&["ing"])
            .singular("ingress")
            .status()
            .counted(),
        resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
            .short(&["netpol"])
            .singular("networkpolicy")
            .counted(),
    ]
}

fn reviews() -> Vec<Resource> {
    let authentication = |kind, plural| resource("authentication.k8s.io", "v1", kind, plural).review();
    let authorization = |kind, plural| resource("authorization.k8s.io", "v1", kind, plural).review();
    vec![
        authentication("SelfSubjectReview", "selfsubjectreviews").cluster(),
        authentication("TokenReview", "tokenreviews").cluster(),
        authorization("LocalSubjectAccessReview", "localsubjectaccessreviews"),
        authorization("SelfSubjectAccessReview", "selfsubjectaccessreviews").cluster(),
        authorization("SelfSubjectRulesReview", "selfsubjectrulesreviews").cluster(),
        authorization("SubjectAccessReview", "subjectaccessreviews").cluster(),
    ]
}

fn measurements() -> Vec<Resource> {
    let measured = |kind, plural| {
        let mut resource = resource(crate::metrics::GROUP, "v1beta1", kind, plural);
        resource.measured = true;
        // As metrics-server names them.
        resource.singular(&plural[..plural.len() - 1])
    };
    vec![measured("NodeMetrics", "nodes").cluster(), measured("PodMetrics", "pods")]
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> Resource {
    Resource {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        list_kind: format!("{kind}List"),
        plural: plural.to_owned(),
        singular: kind.to_ascii_lowercase(),
        short: Vec::new(),
        categories: Vec::new(),
        namespaced: true,
        ty: Type::Struct(type_of(kind)),
        names: Names::Subdomain,
        status: false,
        scale: None,
        subresources: Vec::new(),
        fields: vec!["metadata.name".to_owned(), "metadata.namespace".to_owned()],
        generation: false,
        review: false,
        measured: false,
        returns_deleted: false,
        custom: None,
        stored_as: None,
    }
}

impl Resource {
    fn cluster(mut self) -> Self {
        self.namespaced = false;
        self
    }

    fn short(mut self, names: &[&str]) -> Self {
        self.short = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    fn singular(mut self, name: &str) -> Self {
        self.singular = name.to_owned();
        self
    }

    fn all(mut self) -> Self {
        self.categories = vec!["all".to_owned()];
        self
    }

    fn status(mut self) -> Self {
        self.status = true;
        self
    }

    fn scale(mut self) -> Self {
        self.scale = Some(Scale {
            spec: "spec.replicas".to_owned(),
            status: "status.replicas".to_owned(),
            selector: "spec.selector".to_owned(),
        });
        self
    }

    fn sub(mut self, subresources: &[Subresource]) -> Self {
        self.subresources = subresources.to_vec();
        self
    }

    fn names(mut self, names: Names) -> Self {
        self.names = names;
        self
    }

    fn fields(mut self, fields: &[&str]) -> Self {
        self.fields.extend(fields.iter().map(|field| (*field).to_owned()));
        self
    }

    fn counted(mut self) -> Self {
        self.generation = true;
        self
    }

    fn review(mut self) -> Self {
        self.review = true;
        self
    }

    fn returns_deleted(mut self) -> Self {
        self.returns_deleted = true;
        self
    }
}
