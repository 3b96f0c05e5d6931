// Accesses to memory: bounds, alignment, what was never written, and which accesses nothing orders.
#pragma once
#include "machine.h"

void Machine::record(const Report& r) {
  u64 key = (u64)r.kind << 56 ^ (u64)(u32)r.pc << 28 ^ (u64)(u32)r.other_pc;  // one report per pair of instructions
  auto found = reported.find(key);
  if (found != reported.end()) {
    reports[found->second].count++;
  } else if (n_reports < max_reports) {
    reported[key] = n_reports;
    reports[n_reports++] = r;
  }
}
void Machine::report(int kind, const At& at, u64 address, int space, int mode) {
  record({kind, at.pc, mode, space, address, at.c.linear, at.thread(), -1, -1, 1});
}

bool Machine::before(const Access& x, const At& at) {
  int cta = (x.thread - 1) / threads, thread = (x.thread - 1) % threads;
  if (cta == at.c.linear) {
    bool same_warp = thread / 32 == at.w.id;
    if (thread == at.thread() || at.c.ordered[thread] >= x.clock) return true;
    if (same_warp && (x.whole_warp || at.w.ordered[thread & 31] >= x.clock)) return true;
  }
  const KnownPtr& known = at.c.known[at.thread()];
  return known && known->has(cta, thread, x.clock);
}
void Machine::conflict(int kind, const Access& x, const At& at, u64 address, int space) {
  int thread = x.thread - 1;
  record({kind, at.pc, (s32)x.pc, space, address, at.c.linear, at.thread(), thread / threads, thread % threads, 1});
}
// Keep accesses that are not ordered before this one; of too many, those of different warps.
void Machine::keep(Access* slots, int n, const Access& mine, const At& at) {
  Access *free = nullptr, *same_warp = nullptr;
  for (Access* x = slots; x < slots + n; x++) {
    if (!x->thread || x->thread == mine.thread || before(*x, at)) {
      if (free) x->thread = 0;
      else free = x;
    } else if ((x->thread - 1) / 32 == (mine.thread - 1) / 32) {
      same_warp = x;
    }
  }
  *(free ? free : same_warp ? same_warp : slots + n - 1) = mine;
}
void Machine::on_read(Cell& cell, const At& at, u64 address, int space, bool strong, bool whole_warp) {
  Access mine{u32(at.c.linear * threads + at.thread() + 1), at.c.clock[at.thread()], (u32)at.pc, strong, whole_warp,
              at.w.groups.size() == 1};
  if (cell.write.thread && !before(cell.write, at)) conflict(RACE_WRITE_READ, cell.write, at, address, space);
  if (!strong)
    for (auto& x : cell.atomics)
      if (x.thread && !before(x, at)) conflict(RACE_WRITE_READ, x, at, address, space);
  keep(cell.reads, 3, mine, at);
}
// Not reported: a value that was there already; and a read of this warp, undivided then and now, which is issued before
// the write. Triton's lanes store elements in place that others of the warp have loaded.
void Machine::on_write(Cell& cell, const At& at, u64 address, int space, bool strong, bool same_value) {
  Access mine{u32(at.c.linear * threads + at.thread() + 1), at.c.clock[at.thread()], (u32)at.pc, strong, false, false};
  bool together = at.w.groups.size() == 1, reports_it = strong || !same_value;
  if (reports_it) {
    if (cell.write.thread && !before(cell.write, at)) conflict(RACE_WRITE_WRITE, cell.write, at, address, space);
    for (auto& x : cell.reads) {
      if (!x.thread || (strong && x.strong) || before(x, at)) continue;
      bool in_step = together && x.together && (x.thread - 1) / 32 == (mine.thread - 1) / 32;
      if (!in_step) conflict(RACE_READ_WRITE, x, at, address, space);
    }
  }
  for (auto& x : cell.atomics) {
    if (strong || !x.thread) continue;
    if (before(x, at)) x.thread = 0;
    else conflict(RACE_WRITE_WRITE, x, at, address, space);
  }
  if (strong) keep(cell.atomics, 2, mine, at);
  else cell.write = mine;
  for (auto& x : cell.reads)
    if (x.thread && before(x, at)) x.thread = 0;
}

KnownPtr Machine::own_clock(const At& at) {
  auto clock = std::make_shared<Clock>(at.c.ordered.begin(), at.c.ordered.begin() + threads);
  for (int l = 0; l < 32 && at.w.id * 32 + l < threads; l++)
    (*clock)[at.w.id * 32 + l] = std::max((*clock)[at.w.id * 32 + l], at.w.ordered[l]);
  (*clock)[at.thread()] = at.c.clock[at.thread()];
  auto known = std::make_shared<Known>();
  known->clocks[at.c.linear] = clock;
  return join(at.c.known[at.thread()], known);
}
static void share(std::vector<KnownPtr>& known, int first, int n) {
  KnownPtr all = known[first];
  for (int t = first; t < first + n; t++) all = join(all, known[t]);
  for (int t = first; t < first + n; t++) known[t] = all;
}
void Machine::order_warp(Cta& c, Warp& w, u32 lanes) {
  if (!schedule.races || (lanes != (w.full & ~w.exited))) return;  // a part of the warp orders nothing here
  int n = std::min(32, threads - w.id * 32);
  for (int l = 0; l < n; l++) w.ordered[l] = c.clock[w.id * 32 + l]++;
  share(c.known, w.id * 32, n);
}
void Machine::order_cta(Cta& c) {
  if (!schedule.races) return;
  for (int t = 0; t < threads; t++) c.ordered[t] = c.clock[t]++;
  share(c.known, 0, threads);
}
// now: else (a relaxed access) with the thread's next fence. scope: 0 CTA, 1 GPU, 2 system.
void Machine::acquire(const At& at, u64 address, bool now) {
  auto found = synchronised.find(address);
  if (found == synchronised.end()) return;
  KnownPtr got = found->second.everywhere;
  if (found->second.cta == at.c.linear) got = join(got, found->second.in_cta);
  KnownPtr& mine = now ? at.c.known[at.thread()] : at.c.relaxed[at.thread()];
  mine = join(mine, got);
}
// now: else (a relaxed access) what was before the thread's last fence. adds: a read-modify-write keeps what was left
// here.
void Machine::release(const At& at, u64 address, bool now, int scope, bool adds) {
  Synchronisation& s = synchronised[address];
  int t = at.thread();
  KnownPtr mine = now ? own_clock(at) : at.c.fenced[t];
  if (now) at.c.clock[t]++;
  if (!adds) s = Synchronisation{};
  if (now && scope == 2) s.to_system = true, s.pc = at.pc, s.by_cta = at.c.linear, s.by_thread = t;
  if (!mine) return;
  if (scope == 0) {
    if (s.cta != at.c.linear) s.in_cta.reset();
    s.cta = at.c.linear;
    s.in_cta = join(s.in_cta, mine);
  } else {
    s.everywhere = join(s.everywhere, mine);
  }
}
void Machine::fence(const At& at) {
  int t = at.thread();
  at.c.known[t] = join(at.c.known[t], at.c.relaxed[t]);
  at.c.relaxed[t].reset();
  at.c.fenced[t] = own_clock(at);
  at.c.clock[t]++;
}

Region* Machine::find(u64 address, u32 size) {
  for (int n = 0; n < n_regions; n++) {
    int r = (last_region + n) % n_regions;
    if (address >= regions[r].base && address + size <= regions[r].base + regions[r].size)
      return &regions[last_region = r];
  }
  return nullptr;
}
// mode: 0 read, 1 write, 2 both. value: what is to be written. Returns null where there is nothing to access.
u8* Machine::global(const At& at, u64 address, u32 size, int mode, bool strong, const u8* value) {
  if (address % size) return report(MISALIGNED, at, address, 0, mode), nullptr;
  Region* r = find(address, size);
  if (!r) return report(OUT_OF_BOUNDS, at, address, 0, mode), nullptr;
  u64 offset = address - r->base;
  if (r->valid && memchr(r->valid + offset, 0, size)) {
    report(GAP, at, address, 0, mode);
    if (mode) return nullptr;
  }
  if (r->written) {
    if (mode != 1 && memchr(r->written + offset, 0, size)) report(UNWRITTEN, at, address, 0, mode);
    if (mode) memset(r->written + offset, 1, size);
  }
  if (mode) r->changed = 1;
  if (!schedule.races || !r->tracked) return (u8*)address;
  for (u64 g = offset / r->grain; g <= (offset + size - 1) / r->grain; g++) {
    u64 place = r->base + g * r->grain;
    Cell& cell = cells[r - regions][g];
    bool whole = value && place >= address && place + r->grain <= address + size;
    if (mode == 0) on_read(cell, at, place, 0, strong);
    else on_write(cell, at, place, 0, strong, whole && !memcmp((u8*)place, value + (place - address), r->grain));
  }
  return (u8*)address;
}
u8* Machine::shared(const At& at, u32 address, u32 size, u32 alignment, int mode, bool strong, const u8* value,
                    bool async) {
  if (address % alignment) return report(MISALIGNED, at, address, 1, mode), nullptr;
  if (address < SHARED_BASE || address + size > SHARED_BASE + shared_bytes)
    return report(SHARED_BOUNDS, at, address, 1, mode), nullptr;
  u32 offset = address - SHARED_BASE;
  Cta& c = at.c;
  if (memchr(&c.state[offset], UNDER_WAY, size)) report(IN_FLIGHT, at, address, 1, mode);
  else if (mode != 1 && memchr(&c.state[offset], NEVER_WRITTEN, size)) report(SHARED_UNWRITTEN, at, address, 1, mode);
  if (mode && !async) memset(&c.state[offset], THERE, size);
  for (u32 g = offset / shared_grain; g <= (offset + size - 1) / shared_grain; g++) {
    if (mode) c.written_at[g] = instructions;
    if (mode && c.read_by_products[g]) report(IN_FLIGHT, at, address, 1, mode);
    if (!schedule.races) continue;
    u32 place = g * shared_grain;
    bool whole = value && place >= offset && place + shared_grain <= offset + size;
    if (mode == 0) on_read(c.cells[g], at, SHARED_BASE + place, 1, strong);
    else on_write(c.cells[g], at, SHARED_BASE + place, 1, strong,
                  whole && !memcmp(&c.shared[place], value + (place - offset), shared_grain));
  }
  return &c.shared[offset];
}
// At the end: a host that sees a number released at system scope must see everything that was written.
void Machine::check_published() {
  for (auto& entry : synchronised) {
    Synchronisation& s = entry.second;
    if (!s.to_system) continue;
    for (int r = 0; r < n_regions; r++)
      for (size_t g = 0; g < cells[r].size(); g++) {
        const Access& x = cells[r][g].write;
        int cta = ((s64)x.thread - 1) / threads, thread = ((s64)x.thread - 1) % threads;
        if (!x.thread || (s.everywhere && s.everywhere->has(cta, thread, x.clock))) continue;
        u64 address = regions[r].base + g * regions[r].grain;
        record({NOT_PUBLISHED, s.pc, (s32)x.pc, 0, address, s.by_cta, s.by_thread, cta, thread, 1});
      }
  }
}
