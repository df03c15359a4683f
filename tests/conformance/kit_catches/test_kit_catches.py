"""The kits against parts that have one fault each: a kit that lets a fault pass is worth nothing."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from cqrs_decor.broker import Broker
from cqrs_decor.codec import Codec
from cqrs_decor.envelope import Envelope
from cqrs_decor.memory import MemoryBroker
from cqrs_decor.store import Store
from cqrs_decor.testing.clock import FakeClock
from cqrs_decor.testing.conformance import (
    BrokerConformance,
    CodecConformance,
    InboxStoreConformance,
    OutboxStoreConformance,
)
from cqrs_decor.testing.conformance.codec import Noted
from cqrs_decor.testing.conformance.kit import Kit, sample
from tests.conformance.kit_catches import faulty_brokers as brokers
from tests.conformance.kit_catches import faulty_codecs as codecs
from tests.conformance.kit_catches import faulty_stores as stores
from tests.conformance.kit_catches.faulty_stores import FaultyStore

pytestmark = pytest.mark.feature("U9")

NOT_LONG = timedelta(seconds=1)


class Brokers(BrokerConformance):
    patience, time_limit = NOT_LONG, NOT_LONG * 2

    def __init__(self, make: Callable[[], Broker]) -> None:
        self.make = make

    @asynccontextmanager
    async def open_broker(self) -> AsyncGenerator[Broker]:
        yield self.make()

    def oversized_envelope(self, topic: str, key: str) -> Envelope | None:
        return sample(topic, key, data=b"x" * 2_000_001)


class Outboxes(OutboxStoreConformance):
    patience, time_limit = NOT_LONG, NOT_LONG * 2

    def __init__(self, make: Callable[[FakeClock], Store]) -> None:
        self.make = make
        self.clock = FakeClock()

    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        yield self.make(self.clock)

    async def advance(self, delay: timedelta) -> None:
        self.clock.advance(delay)


class Inboxes(InboxStoreConformance):
    patience, time_limit = NOT_LONG, NOT_LONG * 2

    def __init__(self, make: Callable[[FakeClock], Store]) -> None:
        self.make = make

    @asynccontextmanager
    async def open_store(self) -> AsyncGenerator[Store]:
        yield self.make(FakeClock())


class Codecs(CodecConformance):
    def __init__(self, make: Callable[[], Codec]) -> None:
        self.make = make

    def make_codec(self) -> Codec:
        return self.make()


def fails(kit: Kit, test: str, *arguments: Any) -> bool:
    """Run one test of a kit. One that does not come to its end catches nothing."""
    try:
        getattr(kit, test)(*arguments)
    except pytest.skip.Exception as skipped:
        raise AssertionError(f"{test} was skipped: {skipped}") from None
    except pytest.fail.Exception as failed:
        if "pytest-timeout" in str(failed):
            raise
        return True
    except Exception:  # whatever a faulty part makes of it
        return True
    return False


FAULTY_BROKERS: dict[type[MemoryBroker], str] = {
    brokers.DropsHeaders: "test_an_envelope_arrives_with_every_attribute_and_header",
    brokers.CutsTimesToMilliseconds: "test_an_envelope_arrives_with_every_attribute_and_header",
    brokers.TakesTheEmptyKeyForNone: "test_any_key_arrives",
    brokers.TakesAnEmptyBodyForADeletion: "test_an_empty_body_arrives",
    brokers.ReadsBodiesAsText: "test_a_body_of_any_bytes_arrives",
    brokers.LosesTheOrderInABatch: "test_the_order_of_each_key_is_kept_over_many_batches",
    brokers.SpreadsAKeyOverPartitions: "test_messages_of_one_key_share_a_partition",
    brokers.AnswersForTheLastOnly: "test_publishing_answers_one_outcome_for_each_envelope",
    brokers.RefusesWhatItHasSeen: "test_publishing_the_same_ids_again_is_allowed",
    brokers.RefusesTheWholeBatch: "test_a_refused_record_takes_no_other_key_with_it",
    brokers.LetsOthersOvertakeARefusedOne: "test_a_refused_record_holds_back_the_later_ones_of_its_key",
    brokers.StaysBrokenAfterARefusal: "test_a_refused_record_takes_no_other_key_with_it",
    brokers.IgnoresStart: "test_a_new_group_may_start_at_the_latest_message",
    brokers.StartsOverAtTheLatest: "test_a_group_that_has_acknowledged_goes_on_where_it_was",
    brokers.HasOneGroupForAll: "test_each_group_receives_everything",
    brokers.ReadersDoNotShare: "test_readers_of_a_group_share_and_the_one_that_leaves_hands_its_work_over",
    brokers.AcknowledgesOnDelivery: "test_what_is_not_acknowledged_comes_again_and_what_is_does_not",
    brokers.AcknowledgesWhatCameBeforeInAnyPartition: "test_acknowledging_one_partition_leaves_the_others",
    brokers.ForgetsAcknowledgements: "test_what_is_not_acknowledged_comes_again_and_what_is_does_not",
    brokers.CountsAcknowledgementsOfThePast: "test_an_acknowledgement_of_a_past_assignment_is_ignored",
    brokers.DoesNotTellBeforePartitionsMove: (
        "test_a_reader_is_told_before_its_partitions_move_and_may_still_acknowledge"
    ),
    brokers.MovesPartitionsBeforeItTells: "test_a_reader_is_told_before_its_partitions_move_and_may_still_acknowledge",
    brokers.LosesWhatAReaderLeavesBehind: "test_unacknowledged_work_comes_again_each_time",
    brokers.IgnoresTheLimit: "test_receive_returns_no_more_than_its_limit",
    brokers.NeverReturnsEmpty: "test_receive_returns_empty_when_nothing_comes",
    brokers.WaitsToTheEnd: "test_receive_returns_as_soon_as_something_comes",
    brokers.LosesWhatACancelledReceiveHadFetched: "test_a_cancelled_receive_loses_nothing",
    brokers.DeliversWhatIsPaused: "test_paused_partitions_are_left_out_and_stay",
    brokers.DropsWhatItHadFetchedOfAPausedPartition: "test_what_was_fetched_of_a_paused_partition_is_not_lost",
    brokers.GivesPausedPartitionsAway: "test_a_reader_that_has_paused_everything_stays_a_member",
    brokers.DeliversPositionsThatRepeat: "test_positions_rise_within_a_partition",
    brokers.CountsTheBacklogOfTheGroup: "test_the_backlog_counts_down_to_zero",
}


@pytest.mark.parametrize(
    ("faulty", "test"), FAULTY_BROKERS.items(), ids=lambda it: getattr(it, "__name__", "caught by")
)
def test_a_faulty_broker_is_caught(faulty: type[MemoryBroker], test: str) -> None:
    """Each of these has been the behaviour of a real broker binding."""
    assert not fails(Brokers(lambda: MemoryBroker(max_bytes=2_000_000)), test)
    assert fails(Brokers(lambda: faulty(max_bytes=2_000_000)), test)


FAULTY_OUTBOXES: dict[type[Any], str] = {
    stores.WritesBeforeTheCommit: "test_records_of_a_rolled_back_transaction_do_not_exist",
    stores.DropsHeaders: "test_an_envelope_is_claimed_with_every_attribute_and_header",
    stores.StoresEmptyTextForNothing: "test_attributes_that_are_not_given_stay_absent",
    stores.GivesNoSequence: "test_the_sequence_rises_within_each_key",
    stores.DrawsLanesById: "test_all_records_of_a_key_are_in_one_lane",
    stores.DrawsIdsEarly: "test_a_record_that_is_committed_late_is_still_claimed",
    stores.GivesALaneToTwo: "test_a_lane_has_one_owner_at_a_time",
    stores.NeverRaisesTheFence: "test_the_fence_rises_with_each_change_of_owner",
    stores.KeepsLeasesForEver: "test_a_lease_that_has_ended_is_taken_over",
    stores.RenewsWithoutExtending: "test_a_renewed_lease_is_kept",
    stores.RenewsWithoutLookingAtTheOwner: "test_renewing_returns_only_what_is_still_held",
    stores.ReleasesWhatOthersHold: "test_releasing_a_lost_lane_leaves_its_new_owner_alone",
    stores.CountsOnlyWhoHoldsLanes: "test_a_renewal_counts_the_relays_that_take_part",
    stores.NeverForgetsARelay: "test_a_relay_that_shows_no_life_is_counted_no_more",
    stores.CountsARelayThatHasLeft: "test_a_relay_that_leaves_is_counted_no_more_at_once",
    stores.TakesAReleaseForLeaving: "test_a_relay_that_leaves_is_counted_no_more_at_once",
    stores.SeesOnlyWhatIsDue: "test_a_renewal_tells_whether_anything_waits",
    stores.IsKeptAwakeByWhatIsParked: "test_what_is_parked_does_not_wait",
    stores.TakesEndedLeasesForHeld: "test_holders_are_told_apart_by_their_leases",
    stores.SuspectsNobody: "test_what_a_vanished_relay_may_have_had_in_hand_is_suspected",
    stores.SuspectsThoseWhoStopped: "test_lanes_that_were_given_back_are_above_suspicion",
    stores.SuspectsEmptyLanes: "test_an_empty_lane_is_above_suspicion",
    stores.SuspectsOneRecordTooFew: "test_what_a_vanished_relay_may_have_had_in_hand_is_suspected",
    stores.SuspectsOnlyTheFirst: "test_the_records_in_hand_are_those_of_all_its_lanes",
    stores.CountsWhatIsInHandAcrossLanes: ("test_what_waits_in_one_lane_does_not_stand_for_what_is_in_hand_of_another"),
    stores.CountsACrashOnlyAtSettle: "test_crashes_in_a_row_are_counted_before_the_record_is_published",
    stores.StepsWithTheWholeLane: "test_a_step_takes_the_first_due_record_of_each_lane",
    stores.AcquitsByWhatComesDue: "test_what_comes_due_before_it_does_not_acquit_the_marked_record",
    stores.StepsAboveUntil: "test_a_step_goes_no_further_than_until",
    stores.StumblesAtTheHeadOfALane: "test_a_step_passes_over_what_is_held_back",
    stores.StepsUnderAnyFence: "test_a_step_under_an_old_fence_is_refused_and_marks_nothing",
    stores.CountsTakeOvers: "test_a_relay_that_vanishes_before_its_step_adds_no_crash",
    stores.NeverCountsTwo: "test_crashes_in_a_row_are_counted_before_the_record_is_published",
    stores.LeavesTheMarkOfASettledStep: "test_a_settled_step_takes_the_mark_off",
    stores.KeepsTheCountForAnotherRecord: "test_the_mark_of_another_record_is_replaced",
    stores.CannotUnmark: "test_a_mark_that_was_taken_off_blames_nobody",
    stores.ForgetsCrashesInAnOutage: "test_neither_an_outage_nor_a_stop_forgets_crashes",
    stores.ForgetsCrashesAtAStop: "test_neither_an_outage_nor_a_stop_forgets_crashes",
    stores.UnmarksUnderAnyFence: "test_a_late_unmark_leaves_the_mark_of_the_new_owner",
    stores.ReleasesWithTheMarkOn: "test_a_release_takes_the_mark_off",
    stores.SettlesStepsWithoutAFence: "test_a_late_step_settles_nothing",
    stores.KeepsTheMarkOfAParkedRecord: "test_the_crashes_of_a_retried_record_start_again",
    stores.ForgetsTheFenceAtClaim: "test_a_claim_under_an_old_fence_is_refused",
    stores.ForgetsTheFenceOfDeliveries: "test_a_late_delivery_report_is_refused_and_writes_nothing",
    stores.ForgetsTheFenceOfFailures: "test_a_late_failure_report_is_refused_and_writes_nothing",
    stores.SettlesTheLanesThatAreLeft: "test_one_lost_lane_refuses_the_whole_settlement",
    stores.ClaimsWhatIsInFlight: "test_records_in_flight_are_not_claimed_again",
    stores.CountsInFlightAgainstTheLimit: "test_records_in_flight_are_not_claimed_again",
    stores.ClaimsFromAllLanes: "test_a_claim_takes_no_more_than_its_limit_and_only_from_its_lanes",
    stores.ClaimsTheNewestFirst: "test_each_lane_is_claimed_in_the_order_of_writing",
    stores.HandsOutHeldBackKeys: "test_a_parked_record_holds_back_its_own_key_only",
    stores.HoldsBackTheKeyInEveryTopic: "test_a_parked_record_holds_back_its_own_key_only",
    stores.HoldsBackTheWholeKey: "test_of_two_parked_records_of_a_key_the_first_can_be_retried_alone",
    stores.HoldsBackWhatHasNoKey: "test_records_without_key_hold_back_nothing",
    stores.TakesTheEmptyKeyForNone: "test_the_empty_key_is_a_key",
    stores.LetsHeldBackKeysUseUpTheLimit: "test_a_held_back_key_does_not_use_up_the_limit",
    stores.KeepsWhatWasDelivered: "test_delivered_records_are_gone",
    stores.ForgetsTheDelay: "test_a_rescheduled_record_is_due_after_its_delay",
    stores.CountsNoAttempts: "test_attempts_and_the_last_error_are_kept",
    stores.RetriesAtTheEnd: "test_a_retried_record_comes_in_its_old_place",
    stores.GoesOnCountingAfterARetry: "test_the_attempts_of_a_retried_record_start_again",
    stores.RetriesTheWholeKey: "test_of_two_parked_records_of_a_key_the_first_can_be_retried_alone",
    stores.LetsARetryOvertake: "test_of_two_parked_records_of_a_key_the_second_waits_for_the_first",
    stores.DiscardsWhatIsPending: "test_a_rescheduled_record_can_be_discarded_and_a_pending_one_cannot",
    stores.StumblesOverDiscardedRecords: "test_settling_a_record_that_was_discarded_meanwhile_is_harmless",
    stores.FindsByAnyFilter: "test_records_are_found_by_what_operators_know",
    stores.ShowsHeldRecordsAsPending: "test_records_are_shown_with_their_states",
    stores.CountsParkedAsPending: "test_the_backlog_counts_what_waits",
    stores.LosesWhatIsBehindAtARetry: "test_what_is_behind_a_parked_record_follows_a_retry_in_order",
    stores.PutsNewRecordsBeforeThoseBehind: "test_what_is_behind_a_parked_record_follows_a_retry_in_order",
    stores.HidesWhatIsBehind: "test_what_is_behind_a_parked_record_stays_visible",
    stores.ForgetsAKeyThatNobodyHolds: "test_what_is_behind_a_parked_record_survives_a_change_of_owner",
    stores.DiscardsAndSetsTheWholeKeyFree: "test_of_two_parked_records_of_a_key_discarding_the_first_leaves_the_second",
    stores.ReadsTheErrorAsAPattern: "test_records_are_found_by_error_and_age_and_page_by_page",
    stores.IgnoresTheAge: "test_records_are_found_by_error_and_age_and_page_by_page",
    stores.ShowsTheFirstPageAlways: "test_records_are_found_by_error_and_age_and_page_by_page",
    stores.KeepsNothing: "test_delivered_records_are_kept_when_asked",
    stores.ShowsTheHistoryUnasked: "test_delivered_records_are_kept_when_asked",
    stores.ReplaysUnderTheOldSequence: "test_replayed_records_come_at_the_end_under_their_own_ids",
    stores.ReplaysUnderNewIds: "test_replayed_records_come_at_the_end_under_their_own_ids",
    stores.CleansUpWhatIsYoung: "test_the_history_is_cleaned_up_in_pieces",
    stores.CleansUpEverythingAtOnce: "test_the_history_is_cleaned_up_in_pieces",
}


@pytest.mark.parametrize(
    ("faulty", "test"), FAULTY_OUTBOXES.items(), ids=lambda it: getattr(it, "__name__", "caught by")
)
def test_a_faulty_outbox_is_caught(faulty: type[Any], test: str) -> None:
    """Each of these loses, repeats or reorders events in a way that no test of an application would notice."""

    def make(clock: FakeClock) -> Store:
        if faulty is stores.DrawsIdsEarly:
            return FaultyStore(clock, outbox=stores.DrawsIdsEarlyAndPages, transaction=stores.DrawsIdsEarly)
        if faulty is stores.WritesBeforeTheCommit:
            return FaultyStore(clock, transaction=faulty)
        return FaultyStore(clock, outbox=faulty)

    assert not fails(Outboxes(FaultyStore), test)
    assert fails(Outboxes(make), test)


FAULTY_WAKE_UPS: dict[type[Any], str] = {
    stores.SendsNowhere: "test_a_wake_up_reaches_every_relay_that_listens",
    stores.WakesOneRelayOnly: "test_a_wake_up_reaches_every_relay_that_listens",
    stores.NeverEchoes: "test_a_renewal_echoes_to_its_owner",
    stores.EchoesToEverybody: "test_a_renewal_echoes_to_its_owner",
    stores.ForgetsWhatNobodyWaitedFor: "test_wake_ups_that_nobody_waited_for_are_kept",
    stores.StumblesOverThoseWhoLeft: "test_sending_without_a_listener_is_harmless",
}


@pytest.mark.parametrize(
    ("faulty", "test"), FAULTY_WAKE_UPS.items(), ids=lambda it: getattr(it, "__name__", "caught by")
)
def test_faulty_wake_ups_are_caught(faulty: type[Any], test: str) -> None:
    """Each of these leaves a relay asleep over work, or lets it believe that it would be woken."""
    assert not fails(Outboxes(FaultyStore), test)
    assert fails(Outboxes(lambda clock: FaultyStore(clock, wake_ups=faulty)), test)


FAULTY_INBOXES: dict[type[Any], str] = {
    stores.KeyedByIdAlone: "test_each_consumer_has_a_message_for_itself",
    stores.ForgetsTheSource: "test_the_same_id_of_another_source_is_another_message",
    stores.ComparesWithoutCase: "test_ids_are_told_apart_exactly",
    stores.IgnoresTrailingBlanks: "test_ids_are_told_apart_exactly",
    stores.RecordsOutsideTheTransaction: "test_a_rolled_back_record_leaves_nothing",
    stores.LetsCopiesRunSideBySide: "test_a_copy_waits_for_the_first_and_is_not_new_when_it_commits",
    stores.CallsAnOpenRecordADuplicate: "test_a_copy_waits_for_the_first_and_is_new_when_it_rolls_back",
    stores.ParksTwice: "test_parking_again_replaces_error_and_count",
    stores.ParksForAllConsumersAtOnce: "test_each_consumer_parks_a_message_for_itself",
    stores.KeepsTheOldReason: "test_parking_again_replaces_error_and_count",
    stores.GoesOnRetrying: "test_parking_again_replaces_error_and_count",
    stores.MovesParkedAgainToTheEnd: "test_parking_again_replaces_error_and_count",
    stores.ParksWithoutHeaders: "test_a_parked_message_is_kept_whole",
    stores.UnparksAtOnce: "test_a_rollback_keeps_the_message_parked",
    stores.LetsTwoUnpark: "test_a_message_is_taken_out_of_parking_by_a_commit",
    stores.RetriesForEverybody: "test_a_retry_is_asked_for_and_left_to_the_worker",
    stores.TakesRetriedMessagesOut: "test_a_retry_is_asked_for_and_left_to_the_worker",
    stores.HoldsNoKey: "test_a_parked_message_holds_its_key",
    stores.HoldsTheKeyForEverybody: "test_a_parked_message_holds_nothing_else",
    stores.HoldsTheKeyOnEveryTopic: "test_a_parked_message_holds_nothing_else",
    stores.TakesTheEmptyKeyForNoKey: "test_the_empty_key_is_a_key",
    stores.NotesWhatIsHeld: "test_a_parked_message_holds_its_key",
    stores.ForgetsThatAParkedOneWasHad: "test_a_parked_message_holds_its_key",
    stores.ParksWhatWasHandled: "test_what_was_handled_meanwhile_is_not_parked",
    stores.ParksBesideACopy: "test_parking_waits_for_a_copy_that_is_being_handled",
    stores.HoldsBackBehindNothing: "test_what_need_not_wait_is_not_kept_behind",
    stores.HoldsBackTwice: "test_what_the_consumer_has_is_not_kept_behind",
    stores.ShowsHeldOnesAsFailed: "test_what_comes_later_is_kept_behind",
    stores.LeavesTheNextWaiting: "test_with_the_success_of_one_the_next_has_its_turn",
    stores.AsksForAllBehind: "test_giving_up_one_in_the_middle_moves_nobody",
    stores.FreesTheKeyWithTheFirst: "test_with_the_success_of_one_the_next_has_its_turn",
    stores.KeepsTheKeyForEver: "test_when_the_last_is_given_up_the_key_is_free",
    stores.RetriesTheSecondFirst: "test_of_each_key_only_the_first_is_retried",
    stores.LetsHeldOnesBeAskedFor: "test_one_that_is_held_cannot_be_asked_for",
    stores.DiscardsWithoutTheNext: "test_when_the_first_is_given_up_the_next_has_its_turn",
    stores.ForgetsWhatIsDiscarded: "test_when_the_last_is_given_up_the_key_is_free",
    stores.FindsByPatterns: "test_parked_messages_are_found_by_what_happened_to_them",
    stores.RecordsManyWithOneAnswer: "test_many_are_noted_at_once_each_with_its_own_answer",
    stores.RecordsManyInTheirOwnOrder: "test_two_batches_of_the_same_messages_do_not_lock_each_other_out",
    stores.RecordsManyOutsideTheTransaction: "test_many_that_were_rolled_back_leave_nothing",
    stores.ForgetsTheSuspect: "test_what_a_vanished_worker_had_in_hand_is_told_to_the_next",
    stores.TellsAMarkOnce: "test_what_a_vanished_worker_had_in_hand_is_told_to_the_next",
    stores.KeepsTheFirstMark: "test_a_mark_replaces_the_one_before",
    stores.TellsAWorkerItsOwnMarks: "test_a_mark_replaces_the_one_before",
    stores.TakesNoMarkOff: "test_marks_that_were_taken_off_are_gone",
    stores.AcquitsAtAStop: "test_what_is_known_of_crashes_outlives_a_stop",
    stores.TakesOffAnybodysMarks: "test_a_worker_takes_off_its_own_marks_only",
    stores.SharesMarksAmongGroups: "test_each_group_has_its_own_marks",
}


@pytest.mark.parametrize(
    ("faulty", "test"), FAULTY_INBOXES.items(), ids=lambda it: getattr(it, "__name__", "caught by")
)
def test_a_faulty_inbox_is_caught(faulty: type[Any], test: str) -> None:
    """Each of these lets an effect happen twice, or never."""
    assert not fails(Inboxes(FaultyStore), test)
    assert fails(Inboxes(lambda clock: FaultyStore(clock, inbox=faulty)), test)


FAULTY_CODECS: dict[type[Any], tuple[Any, ...]] = {
    codecs.WritesAscii: ("test_any_text_comes_back", "żółć"),
    codecs.WritesNumbersAsFloats: ("test_any_64_bit_number_comes_back", 2**53 + 1),
    codecs.WritesDecimalsAsFloats: ("test_decimals_keep_their_digits",),
    codecs.LeavesTheZoneOut: ("test_a_moment_keeps_its_instant_in_any_zone",),
    codecs.RefusesUnknownFields: ("test_fields_that_are_not_known_are_left_out",),
    codecs.CallsEverythingUndecodable: ("test_a_misfit_names_the_path_of_the_field",),
    codecs.CallsEverythingInvalid: ("test_broken_bytes_are_undecodable", b"{"),
    codecs.ShowsTheValue: ("test_an_error_never_shows_the_value", Noted, {"text": "a", "number": "s3cret-7f"}),
    codecs.LetsAnyErrorOut: ("test_what_cannot_be_written_is_an_error_of_the_message",),
}


@pytest.mark.parametrize(("faulty", "test"), FAULTY_CODECS.items(), ids=lambda it: getattr(it, "__name__", "caught by"))
def test_a_faulty_codec_is_caught(faulty: type[Any], test: tuple[Any, ...]) -> None:
    """Each of these changes what was said, or tells a log what it must not know."""
    assert not fails(Codecs(codecs.JsonCodec), *test)
    assert fails(Codecs(faulty), *test)
