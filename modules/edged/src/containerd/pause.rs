//! The image of sandboxes: a program that holds a pod's namespaces open, in so few bytes that it needs no registry.
//!
//! It blocks SIGINT, SIGTERM and SIGCHLD and takes them one at a time: the first two end it, the third makes it reap
//! what ended, because where a pod's containers share one process namespace it is their init.

use super::archive::{Entry, Image};

/// Its name. It is imported, never pulled.
pub const NAME: &str = "octobus.local/pause:1";

/// The signals as a mask: bit n - 1 for signal n, of SIGINT (2), SIGTERM (15) and SIGCHLD (17).
const MASK: u32 = 1 << 1 | 1 << 14 | 1 << 16;
const _: () = assert!(MASK == 0x0001_4002, "the code below contains it");

#[rustfmt::skip]
const X86_64: [u8; 77] = [
    // The mask stands on the stack from here on.
    0x68, 0x02, 0x40, 0x01, 0x00, // push 0x14002
    // rt_sigprocmask(SIG_BLOCK, mask, none, 8)
    0x6a, 0x0e, 0x58,             // push 14; pop rax
    0x31, 0xff,                   // xor edi, edi
    0x48, 0x89, 0xe6,             // mov rsi, rsp
    0x31, 0xd2,                   // xor edx, edx
    0x6a, 0x08, 0x41, 0x5a,       // push 8; pop r10
    0x0f, 0x05,                   // syscall
    // wait: rt_sigtimedwait(mask, none, forever, 8)
    0xb8, 0x80, 0x00, 0x00, 0x00, // mov eax, 128
    0x48, 0x89, 0xe7,             // mov rdi, rsp
    0x31, 0xf6,                   // xor esi, esi
    0x31, 0xd2,                   // xor edx, edx
    0x6a, 0x08, 0x41, 0x5a,       // push 8; pop r10
    0x0f, 0x05,                   // syscall
    0x83, 0xf8, 0x11,             // cmp eax, SIGCHLD
    0x74, 0x0b,                   // je reap
    0x85, 0xc0,                   // test eax, eax
    0x78, 0xe5,                   // js wait: interrupted
    // exit(0)
    0x6a, 0x3c, 0x58,             // push 60; pop rax
    0x31, 0xff,                   // xor edi, edi
    0x0f, 0x05,                   // syscall
    // reap: wait4(-1, none, WNOHANG, none) until nothing has ended
    0x6a, 0x3d, 0x58,             // push 61; pop rax
    0x6a, 0xff, 0x5f,             // push -1; pop rdi
    0x31, 0xf6,                   // xor esi, esi
    0x6a, 0x01, 0x5a,             // push 1; pop rdx
    0x45, 0x31, 0xd2,             // xor r10d, r10d
    0x0f, 0x05,                   // syscall
    0x85, 0xc0,                   // test eax, eax
    0x7f, 0xec,                   // jg reap
    0xeb, 0xc8,                   // jmp wait
];

const AARCH64: [u32; 30] = [
    // The mask stands on the stack from here on.
    0xd288_0049, // mov x9, #0x4002
    0xf2a0_0029, // movk x9, #1, lsl #16
    0xf81f_0fe9, // str x9, [sp, #-16]!
    // rt_sigprocmask(SIG_BLOCK, mask, none, 8)
    0xd280_0000, // mov x0, #0
    0x9100_03e1, // mov x1, sp
    0xd280_0002, // mov x2, #0
    0xd280_0103, // mov x3, #8
    0xd280_10e8, // mov x8, #135
    0xd400_0001, // svc #0
    // wait: rt_sigtimedwait(mask, none, forever, 8)
    0x9100_03e0, // mov x0, sp
    0xd280_0001, // mov x1, #0
    0xd280_0002, // mov x2, #0
    0xd280_0103, // mov x3, #8
    0xd280_1128, // mov x8, #137
    0xd400_0001, // svc #0
    0x7100_441f, // cmp w0, SIGCHLD
    0x5400_00a0, // b.eq reap
    0x37ff_ff00, // tbnz w0, #31, wait: interrupted
    // exit(0)
    0xd280_0000, // mov x0, #0
    0xd280_0ba8, // mov x8, #93
    0xd400_0001, // svc #0
    // reap: wait4(-1, none, WNOHANG, none) until nothing has ended
    0x9280_0000, // mov x0, #-1
    0xd280_0001, // mov x1, #0
    0xd280_0022, // mov x2, #1
    0xd280_0003, // mov x3, #0
    0xd280_2088, // mov x8, #260
    0xd400_0001, // svc #0
    0x7100_001f, // cmp w0, #0
    0x54ff_ff2c, // b.gt reap
    0x17ff_ffec, // b wait
];

/// Where the program is in memory. The file's first bytes are there too, so that one segment is enough.
const BASE: u64 = 0x40_0000;
const FILE_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// The image, or none for an architecture that no program was written for.
#[must_use]
pub fn image() -> Option<Image> {
    let program = program(std::env::consts::ARCH)?;
    Some(Image {
        name: NAME.to_owned(),
        entries: vec![("pause".to_owned(), Entry::Program(program))],
        entrypoint: vec!["/pause".to_owned()],
        // Nobody: it needs no right but to wait.
        user: "65535:65535".to_owned(),
        ..Image::default()
    })
}

/// The program as a static ELF file.
fn program(architecture: &str) -> Option<Vec<u8>> {
    let (machine, code): (u16, Vec<u8>) = match architecture {
        "x86_64" => (62, X86_64.to_vec()),
        "aarch64" => (183, AARCH64.iter().flat_map(|word| word.to_le_bytes()).collect()),
        _ => return None,
    };
    let start = FILE_HEADER + 2 * PROGRAM_HEADER;
    let length = start + code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F'];
    // 64 bit, little-endian, version 1, System V.
    file.extend([2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(2_u16.to_le_bytes()); // an executable
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes()); // version
    file.extend((BASE + start).to_le_bytes()); // entry
    file.extend(FILE_HEADER.to_le_bytes()); // program headers
    file.extend(0_u64.to_le_bytes()); // no sections
    file.extend(0_u32.to_le_bytes()); // flags
    for size in [FILE_HEADER, PROGRAM_HEADER, 2, 0, 0, 0] {
        file.extend((size as u16).to_le_bytes()); // sizes of headers, number of program headers, sections
    }
    // The whole file, read and executed; aligned for the largest pages that kernels use.
    segment(&mut file, 1, 5, [0, BASE, BASE, length, length, 0x1_0000]);
    // The stack, read and written: without this header old kernels make it executable.
    segment(&mut file, 0x6474_e551, 6, [0, 0, 0, 0, 0, 16]);
    file.extend(code);
    Some(file)
}

fn segment(file: &mut Vec<u8>, kind: u32, flags: u32, words: [u64; 6]) {
    file.extend(kind.to_le_bytes());
    file.extend(flags.to_le_bytes());
    for word in words {
        file.extend(word.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_program_is_small_and_whole_on_both_architectures() {
        for architecture in ["x86_64", "aarch64"] {
            let program = program(architecture).expect("a program");
            assert!(program.len() < 320, "{}", program.len());
            assert_eq!(program[24..32], (BASE + 176).to_le_bytes());
        }
        assert!(program("riscv64").is_none());
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn it_waits_reaps_and_ends_when_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pause");
        std::fs::write(&path, program(std::env::consts::ARCH).expect("a program")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        // The shell starts a child and becomes the program, so that the child is its own to reap.
        let script = "sleep 0.05 & echo $!; exec \"$0\"";
        let mut pause = Command::new("sh")
            .args(["-c", script, path.to_str().expect("a path")])
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh is installed");
        let mut printed = [0; 16];
        let read = pause.stdout.as_mut().expect("a pipe").read(&mut printed).expect("a number");
        let child = String::from_utf8_lossy(&printed[..read]).trim().to_owned();
        let alive = || std::path::Path::new("/proc").join(&child).exists();
        for _ in 0..1000 {
            if !alive() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!alive(), "it reaps its children");
        assert!(pause.try_wait().expect("its state").is_none(), "it goes on waiting");
        let pid = rustix::process::Pid::from_child(&pause);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
        let status = pause.wait().expect("its end");
        assert_eq!((status.code(), status.signal()), (Some(0), None));
    }
}
